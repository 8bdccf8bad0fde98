"""What is labelled in one go: a shard, or a stretch of one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClipRange:
    """A stretch of a shard's clips, in the order of their bytes."""

    shard: str
    """Its name in the manifest."""
    start: int = 0
    stop: int | None = None
    """Behind its last clip; None is the shard's end."""

    def __str__(self) -> str:
        """Returns its name for people."""
        is_whole = self.start == 0 and self.stop is None
        return self.shard if is_whole else f"{self.shard}, clips {self.start} to {self.stop or 'the last'}"

    def within(self, clips: int) -> slice:
        """Returns which of a shard's clips it is."""
        return slice(self.start, clips if self.stop is None else self.stop)


@dataclass(frozen=True, slots=True)
class ShardJoin:
    """A shard whose clips were all labelled, in stretches: its part is made of them."""

    shard: str
    pieces: tuple[tuple[int, int], ...]
    """(start, stop) of each stretch, in order, without a gap."""

    def __str__(self) -> str:
        """Returns its name for people."""
        return f"{self.shard}, whose stretches are joined"


def as_range(shard: str | ClipRange, clips: int) -> ClipRange:
    """Returns a stretch with both its bounds, also of a shard's name alone.

    Args:
        shard: a name is the whole shard.
        clips: of the shard.
    """
    named = ClipRange(shard) if isinstance(shard, str) else shard
    bounds = named.within(clips)
    return ClipRange(named.shard, bounds.start, bounds.stop)
