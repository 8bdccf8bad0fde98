"""Reads and writes at places of open files, by several threads, on systems without `pread`, too."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PLACING = threading.Lock()


def open_descriptor(path: str | Path, flags: int) -> int:
    """Open a file of bytes; a new one is readable by everybody, as far as the umask allows."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


@contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    """Open a file of bytes for as long as the block lasts."""
    descriptor = open_descriptor(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Returns the `size` bytes at `offset`; fewer where the file ends before."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _PLACING:  # Windows: the place is the descriptor's, which threads share
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write at `offset`; what lies between the end of the file and there becomes zeros, or a hole."""
    if hasattr(os, "pwrite"):
        os.pwrite(descriptor, content, offset)
        return
    with _PLACING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        os.write(descriptor, content)
