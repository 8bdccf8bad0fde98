"""Views of a clip: the same sound shifted in time, amplified and heard through moved mel bands, the same for everybody.

What a view is follows from (seed, clip id, view) alone, so that stage 1 shows a teacher, and stage 2 the student, the
very same samples: "consistent teaching", Beyer et al. 2021, arXiv:2106.05237. View 0 is the clip as it is.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict

from pipeline.errors import UsageError

MAX_VIEWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How far views may differ from the clip; each view draws evenly from these ranges."""

    __pydantic_config__: ClassVar["ConfigDict"] = {"extra": "forbid"}

    seed: int = 0
    """Decides the views, together with clip id and number, 0 or more."""
    max_shift_ms: int = 125
    """The sound begins earlier or later by at most this much, in milliseconds, 0 to 10000; what comes from outside the
    clip is silence."""
    max_gain_db: float = 6.0
    """The sound gets louder or softer by at most this much, in decibels, 0 to 60."""
    low_jitter_hz: int = 10
    """The lower edge of the mel bands rises by 0 to this minus one, in whole hertz; 1 leaves it."""
    high_jitter_hz: int = 2000
    """The upper edge of the mel bands moves by at most half of this either way, in whole hertz; 1 leaves it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"view.seed is {self.seed}; choose 0 or more, below 2^63")
        if not 0 <= self.max_shift_ms <= 10_000:
            raise UsageError(f"view.max_shift_ms is {self.max_shift_ms}; choose 0 to 10000 milliseconds")
        if not 0 <= self.max_gain_db <= 60:
            raise UsageError(f"view.max_gain_db is {self.max_gain_db}; choose 0 to 60 decibels")
        if not (1 <= self.low_jitter_hz <= 1000 and 1 <= self.high_jitter_hz <= 10_000):
            raise UsageError("view: low_jitter_hz is 1 (none) to 1000 hertz, high_jitter_hz 1 (none) to 10000")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsStamp:
    """Which views a store holds of each clip, exactly enough to make them again."""

    __pydantic_config__: ClassVar["ConfigDict"] = {"extra": "forbid"}

    count: int
    """Views of a clip, 2 or more: number 0, the clip as it is, and `count - 1` drawn ones."""
    config: ViewConfig
    rule: Literal["blake2b-1"] = "blake2b-1"
    """How (seed, clip id, view) become a view; another rule gets another name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one view does to a clip."""

    seed: int
    """0 to 2^63 - 1: all the rest follows from it and the settings."""
    shift_ms: int
    """How much later the sound begins, in milliseconds; below 0, earlier."""
    gain_db: float
    """In decibels, a multiple of 0.01."""
    low_rise_hz: int
    """What is added to the lower edge of the mel bands."""
    high_rise_hz: int
    """What is added to the upper edge of the mel bands; below 0, it falls."""


def draw_view(config: ViewConfig, clip_id: str, number: int) -> View:
    """Returns a clip's view of that number; number 0 changes nothing.

    The rule `blake2b-1`, for other readers: the view's seed is the first 8 bytes, big-endian, halved, of
    BLAKE2b(`"{config.seed} {number} {clip_id}"`); BLAKE2b of the seed's 8 bytes gives four 64-bit words, and word x
    chooses one of n values as x * n >> 64: shift, gain in hundredths, lower edge, upper edge, each from its lowest.
    """
    name = f"{config.seed} {number} {clip_id}".encode()
    seed = int.from_bytes(blake2b(name, digest_size=8).digest()) >> 1
    if number == 0:
        return View(seed=seed, shift_ms=0, gain_db=0.0, low_rise_hz=0, high_rise_hz=0)
    drawn = blake2b(seed.to_bytes(8), digest_size=32).digest()
    words = [int.from_bytes(drawn[start : start + 8]) for start in range(0, 32, 8)]
    hundredths = round(100 * config.max_gain_db)
    return View(
        seed=seed,
        shift_ms=_choose(words[0], 2 * config.max_shift_ms + 1) - config.max_shift_ms,
        gain_db=(_choose(words[1], 2 * hundredths + 1) - hundredths) / 100,
        low_rise_hz=_choose(words[2], config.low_jitter_hz),
        high_rise_hz=config.high_jitter_hz // 2 - _choose(words[3], config.high_jitter_hz),
    )


def _choose(word: int, values: int) -> int:
    return word * values >> 64


def extra_seconds(config: ViewConfig) -> float:
    """How much more of a clip than a model's input length has to be decoded, so that an earlier view ends in sound."""
    return config.max_shift_ms / 1000


def apply_view(waveform: np.ndarray, view: View, *, sample_rate_hz: int, samples: int) -> np.ndarray:
    """Returns the waveform of a view; its mel bands are the front end's part.

    Sample n of the view is sample n - shift of the clip, times the gain: not rolled in a circle, so that a view does
    not depend on a model's input length.

    Args:
        waveform: the clip, float32, with `extra_seconds` more than `samples` where there is more.
        view: from `draw_view`.
        sample_rate_hz: of both.
        samples: the view's length.

    Returns:
        (samples,), float32. A shift is rounded to whole samples; at rates of whole kilohertz it is exact.
    """
    shift = round(view.shift_ms * sample_rate_hz / 1000)
    later, earlier = max(shift, 0), max(-shift, 0)
    kept = waveform[earlier : earlier + samples - later]
    shifted = np.zeros(samples, dtype=np.float32)
    shifted[later : later + len(kept)] = kept * np.float32(10 ** (view.gain_db / 20))
    return shifted


def pick_views(rows: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Choose one of `count` views for each clip of a step, each as likely as the others.

    A clip's view depends on its row and the seed, not on its position, so it is the same on any number of processes.

    Args:
        rows: (batch,), int64, of the manifest.
        count: how many views there are.
        seed: of the step, 0 or more.

    Returns:
        (batch,), int64, 0 to `count - 1`.
    """
    # The finalizer of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195): neighbours become unrelated.
    word = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    word ^= word >> np.uint64(31)
    return ((word >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
