"""Arrays that lie in files: larger than memory, shared between processes, and not counted against this one."""

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pipeline.errors import StorageFullError


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Make an array of zeros in a nameless file of the temporary folder, which goes away with it.

    The logits of two million clips are gigabytes. In a file they move to the disk where memory is short, instead of
    ending the process.

    Raises:
        StorageFullError: that folder has no room for it.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            reserve(file.fileno(), size, tempfile.gettempdir())
        except OSError as error:
            raise StorageFullError(
                f"{tempfile.gettempdir()}: has no room for {size / 1e6:,.0f} MB that are needed for a while "
                f"({error.strerror}). Make room, or name another folder by TMPDIR"
            ) from error
        mapped: np.ndarray[Any, Any] = np.memmap(file, dtype, mode="w+", shape=shape)
        return mapped


def reserve(descriptor: int, size: int, folder: str | Path) -> None:
    """Make sure that an open file can grow to `size` bytes: a full disk is an error here, but a crash in mapped memory.

    Args:
        descriptor: the file's.
        size: in bytes.
        folder: where it lies, for systems that can't reserve room for a file and only tell how much is free.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    elif shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forget_pages(mapped: np.ndarray) -> None:
    """Let go of a mapped array's pages in this process; they stay in the page cache, and nothing is lost.

    A process that reads here and there would map the whole file by and by, and be counted, or killed, for gigabytes
    that it does not own.
    """
    if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such advice
        mapped.base.madvise(mmap.MADV_DONTNEED)
