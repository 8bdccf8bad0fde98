"""Byte ranges of any files, read by many threads."""

import threading

from pipeline.ingest.sources import from_folder
from pipeline.storage import files as storage


class FileRanges:
    """Reads ranges of files; a reader of ranges serves one thread, so each thread has its own.

    Args:
        working_folder: what paths that aren't absolute are relative to.
    """

    def __init__(self, working_folder: str) -> None:
        self._working_folder = working_folder
        self._own = threading.local()

    def read(self, location: str, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of a file; fewer where it ends before.

        Raises:
            PipelineError: the file is not there, or can't be read.
        """
        if not hasattr(self._own, "readers"):
            self._own.readers = {}
        folder, name = storage.split_path(from_folder(self._working_folder, location))
        reader = self._own.readers.setdefault(folder, storage.RangeReader(folder))
        return reader.read(name, offset, size)
