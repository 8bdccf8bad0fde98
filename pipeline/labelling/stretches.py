"""Bytes of a shard that were fetched, in memory that processes share. It imports neither torch nor Arrow."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.decoding.shared_memory import SharedFile
from pipeline.storage.descriptors import opened, read_at


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some bytes of a shard, in memory that processes of this machine can read as long as `memory` lives."""

    memory: SharedFile
    offset: int
    """Of its first byte in the shard."""
    size: int
    """Bytes; fewer than were asked for where the shard ends before."""

    @property
    def place(self) -> "StretchPlace":
        """Where another process finds it."""
        return StretchPlace(self.memory.path, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class StretchPlace:
    """Where a stretch is; the path and the offset in the shard."""

    path: str
    offset: int
    size: int

    def read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read some (offset, size) of the shard; fewer bytes where the shard ends before."""
        with opened(Path(self.path), os.O_RDONLY) as descriptor:
            return [
                read_at(descriptor, max(0, min(size, self.offset + self.size - offset)), offset - self.offset)
                for offset, size in wanted
            ]
