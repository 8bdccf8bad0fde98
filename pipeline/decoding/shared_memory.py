"""Memory that the processes of one command share: clips' columns on the way there, waveforms on the way back.

It is a file without a name, which goes away with whoever holds it: anonymous memory on Linux, elsewhere a file of the
temporary folder. Never `/dev/shm`, of which a container has 64 MB unless somebody asks for more.
"""

import ctypes
import mmap
import os
import pickle
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from pipeline.errors import StorageFullError

_ALIGNED_BYTES = 64
"""Where arrays begin, as torch's and NumPy's vector instructions like it."""


class SharedFile:
    """A file for other processes, which open it by `path` for as long as this object lives.

    Args:
        size: in bytes; what nobody has written is zeros and takes no memory.

    Raises:
        StorageFullError: there is no room for it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._named: str | None = None
        try:
            if hasattr(os, "memfd_create"):
                self._descriptor = os.memfd_create("audioset-distill")
                self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            else:
                self._descriptor, self.path = tempfile.mkstemp(prefix="shared-")
                self._named = self.path
            self._closing = weakref.finalize(self, _close, self._descriptor, self._named)
            os.truncate(self._descriptor, self.size)
        except OSError as error:
            raise _no_room(size, error) from error

    def map(self) -> mmap.mmap:
        """Map the whole file.

        Raises:
            StorageFullError: there is no room for it in this process.
        """
        try:
            return mmap.mmap(self._descriptor, self.size)
        except OSError as error:
            raise _no_room(self.size, error) from error

    def read_from(self, offset: int) -> bytes:
        """Read what others appended behind an offset."""
        return os.pread(self._descriptor, 1 << 20, offset)

    def close(self) -> None:
        """Let go of the file; who has mapped it keeps what is mapped."""
        self._closing()


def _close(descriptor: int, named: str | None) -> None:
    os.close(descriptor)
    if named is not None:
        with suppress(OSError):  # on Windows not while somebody has it open
            os.unlink(named)


def append_to_shared(path: str) -> BinaryIO:
    """Open another process's `SharedFile` for writing at its end, without a buffer."""
    return open(path, "ab", buffering=0)


def map_shared(path: str, *, writable: bool = False) -> mmap.mmap:
    """Map another process's `SharedFile`.

    Raises:
        StorageFullError: there is no room for it in this process.
    """
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except OSError as error:
        raise _no_room(os.path.getsize(path), error) from error


def _no_room(size: int, error: OSError) -> StorageFullError:
    return StorageFullError(
        f"no room for {size / 1e6:,.0f} MB that processes share ({error.strerror}). Make room in "
        f"{tempfile.gettempdir()}, or give the machine more memory"
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """An object as bytes, and where the arrays in it lie."""

    payload: bytes
    spans: tuple[tuple[int, int], ...]
    """(offset, bytes) of each of its arrays in the shared memory."""

    def unpack(self, memory: Any) -> Any:
        """Make the object, whose arrays lie in `memory`, anything with a buffer, and are not copied."""
        whole = memoryview(memory)
        return pickle.loads(self.payload, buffers=[whole[offset : offset + size] for offset, size in self.spans])


class Arena:
    """A stretch of memory that arrays are made in, one behind the other; without any, arrays are ordinary ones.

    Args:
        memory: shared, writable.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        self._memory = np.frombuffer(b"" if memory is None else memory, np.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """Make an array of any values."""
        kind = np.dtype(dtype)
        place = self._reserve(int(np.prod(shape)) * kind.itemsize)
        return np.empty(shape, kind) if place is None else self._memory[place].view(kind).reshape(shape)

    def pack(self, value: object) -> Packed:
        """Spell an object; its arrays stay where `empty` made them or are copied there, as far as there is room."""
        spans: list[tuple[int, int]] = []

        def keep_out(buffer: pickle.PickleBuffer) -> bool:
            try:
                array = np.frombuffer(buffer.raw(), np.uint8)
            except BufferError:  # not in one piece
                return True
            place = self._place_of(array)
            if place is None:
                if (place := self._reserve(len(array))) is None:
                    return True
                self._memory[place] = array
            spans.append((place.start, len(array)))
            return False

        return Packed(pickle.dumps(value, protocol=5, buffer_callback=keep_out), tuple(spans))

    def _reserve(self, size: int) -> slice | None:
        start = -(-self._used // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if not size or start + size > len(self._memory):
            return None
        self._used = start + size
        return slice(start, start + size)

    def _place_of(self, array: np.ndarray) -> slice | None:
        start = array.ctypes.data - self._memory.ctypes.data
        inside = len(array) and start >= 0 and start + len(array) <= len(self._memory)
        return slice(start, start + len(array)) if inside else None


def share_object(value: object) -> tuple[Packed, SharedFile]:
    """Spell an object for other processes; its arrays go into a file that all of them map, into nobody's own memory."""
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    size = sum(buffer.raw().nbytes + _ALIGNED_BYTES for buffer in buffers)
    file = SharedFile(max(size, 1))
    return Arena(memoryview(file.map())).pack(value), file


class Blocks:
    """Equal blocks of shared memory, lent out one by one.

    Args:
        count: how many there are.
        size: of each, in bytes.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = SharedFile(count * self.size)
        self._memory = self.file.map()
        self._free = deque(range(count))
        self._lent: set[int] = set()

    @property
    def lent(self) -> int:
        """How many blocks somebody still looks at."""
        return len(self._lent)

    @property
    def has_free(self) -> bool:
        """Whether there is a block that nobody needs."""
        return bool(self._free)

    def take(self) -> int | None:
        """Take a block that nobody needs; give its offset in the file, or None where there is no such block."""
        return self._free.popleft() * self.size if self._free else None

    def give_back(self, offset: int) -> None:
        """Free a block again."""
        self._free.append(offset // self.size)

    def lend(self, offset: int) -> Any:
        """Returns a block as a buffer; it is free again as soon as nothing refers to any part of that."""
        lent = (ctypes.c_char * self.size).from_buffer(self._memory, offset)
        self._lent.add(offset)
        weakref.finalize(lent, self._return, offset).atexit = False
        return lent

    def view(self, offset: int) -> memoryview:
        """Returns a block as a buffer for the moment."""
        return memoryview(self._memory)[offset : offset + self.size]

    def _return(self, offset: int) -> None:
        self._lent.discard(offset)
        self.give_back(offset)
