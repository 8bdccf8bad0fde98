"""A long encoded file as bytes that stay on the disk: read where they are asked for, and given back behind that.

The readers of formats take it for `bytes`. What they have passed is dropped from this process's memory every few
megabytes, so that a recording of hours takes no more of it than one of minutes.
"""

import io
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, SupportsIndex

_DROP_BYTES = 16 << 20
"""So much is read between two drops."""
_KEPT_BYTES = mmap.ALLOCATIONGRANULARITY
"""At the beginning, where headers are, some of them mended."""


class MappedSound(mmap.mmap):
    """The bytes of a local file; what is written to them stays in this process."""

    def __new__(cls, path: Path) -> Self:
        """Map a file.

        Raises:
            OSError: it can't be opened.
        """
        with path.open("rb") as file:
            return super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __init__(self, path: Path) -> None:
        del path
        super().__init__()
        self._since = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self._count(1 if isinstance(found, int) else len(found) + mmap.PAGESIZE)
        return found

    def startswith(self, beginning: bytes, place: int = 0) -> bool:
        """Whether some bytes stand at a place."""
        return super().__getitem__(slice(place, place + len(beginning))) == beginning

    def find(self, wanted: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.find`."""
        first, last = self._bounds(start, end)
        while last - first >= len(wanted):
            found = super().find(wanted, first, min(first + _DROP_BYTES + len(wanted) - 1, last))
            if found >= 0:
                return found
            first += _DROP_BYTES
            self._drop()
        return -1

    def rfind(self, wanted: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.rfind`."""
        first, last = self._bounds(start, end)
        while last - first >= len(wanted):
            found = super().rfind(wanted, max(first, last - _DROP_BYTES - len(wanted) + 1), last)
            if found >= 0:
                return found
            last -= _DROP_BYTES
            self._drop()
        return -1

    def _bounds(self, start: SupportsIndex | None, end: SupportsIndex | None) -> tuple[int, int]:
        first, last, _ = slice(start, end).indices(len(self))
        return first, last

    def _count(self, read: int) -> None:
        self._since += read
        if self._since >= _DROP_BYTES:
            self._drop()

    def _drop(self) -> None:
        self._since = 0
        if hasattr(self, "madvise") and len(self) > _KEPT_BYTES:  # not on Windows
            with suppress(OSError):
                self.madvise(mmap.MADV_DONTNEED, _KEPT_BYTES, len(self) - _KEPT_BYTES)


class MappedFile(io.RawIOBase):
    """A stretch of a mapped file as a file of its own, for decoders; no seek and no read of it raises."""

    def __init__(self, data: MappedSound, start: int = 0, end: int | None = None) -> None:
        self._data, self._start = data, start
        self._size = (len(data) if end is None else end) - start
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Returns where the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, within the file whatever is asked for."""
        base = (0, self._place, self._size)[whence]
        self._place = min(max(base + offset, 0), self._size)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there is something left."""
        first = self._start + self._place
        content = self._data[first : min(first + len(buffer), self._start + self._size)]
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
