"""Clips that keep their own lengths: how long a view of one is, and how many of them go together."""

from collections.abc import Iterator, Sequence

ORDINARY_SECONDS = 11.0
"""Where clips are longer than this, fewer make a batch, so that it takes no more memory than others do."""


def view_samples(samples: int, shift_ms: int, *, sample_rate_hz: int, seconds: float) -> int:
    """Returns how long a view is that ends with its sound, or where no model hears it any more.

    Args:
        samples: the clip's.
        shift_ms: how much later the view begins.
        sample_rate_hz: of both.
        seconds: how much is heard at most; may be infinite.
    """
    return max(1, round(min(samples + shift_ms * sample_rate_hz / 1000, seconds * sample_rate_hz)))


def divide_by_length(seconds: Sequence[float], batch_size: int) -> Iterator[slice]:
    """Divide clips, in their order, so that no part, filled up to its longest clip, takes more than ordinary clips do.

    Args:
        seconds: each clip's length.
        batch_size: clips of ordinary length that go together.
    """
    start, longest = 0, 0.0
    for place, length in enumerate(seconds):
        longest = max(longest, length)
        if place > start and (place + 1 - start) * longest > batch_size * ORDINARY_SECONDS:
            yield slice(start, place)
            start, longest = place, length
    if len(seconds) > start:
        yield slice(start, len(seconds))
