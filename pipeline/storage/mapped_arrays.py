"""Arrays that lie in files: larger than memory, shared between processes, and not counted against this one."""

import mmap
import os
import tempfile
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
        try:  # a full disk is an error now, but would be a crash later
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise StorageFullError(
                f"{tempfile.gettempdir()}: has no room for {size / 1e6:,.0f} MB that are needed for a while "
                f"({error.strerror}). Make room, or name another folder by TMPDIR"
            ) from error
        mapped: np.ndarray[Any, Any] = np.memmap(file, dtype, mode="w+", shape=shape)
        return mapped


def forget_pages(mapped: np.ndarray) -> None:
    """Let go of a mapped array's pages in this process; they stay in the page cache, and nothing is lost.

    A process that reads here and there would map the whole file by and by, and be counted, or killed, for gigabytes
    that it does not own.
    """
    if isinstance(mapped.base, mmap.mmap):
        mapped.base.madvise(mmap.MADV_DONTNEED)
