"""A folder that is being written has one writer; a second one is told who that is."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import StorageError, UsageError
from pipeline.storage.files import WRITER_LOCK_NAME, WRITER_NAME, is_remote, local_path


@contextmanager
def one_writer(location: str | Path) -> Iterator[None]:
    """Be the only one of our processes that writes into a folder while the block runs.

    The lock ends with the process, however that ends. Folders behind URLs have none, nor have file systems that know
    no locks.

    Raises:
        UsageError: another process writes there.
        StorageError: nothing may be written there.
    """
    if is_remote(location):
        yield
        return
    folder = local_path(location)
    made = not folder.exists()
    lock = FileLock(folder / WRITER_LOCK_NAME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # how filelock says that this file system has no locks
            lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(
            f"{location}: is being written by {_holder(folder)}. Wait until it ends, end it, or choose another folder"
        ) from error
    except OSError as error:
        raise StorageError(f"{location}: can't be written ({error.strerror or error})") from error
    try:
        _sign(folder)
        yield
    finally:
        (folder / WRITER_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # before it is released: who waits sees that the file is gone, and makes it again
            (folder / WRITER_LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()


def _sign(folder: Path) -> None:
    about = {"process": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(" ", "seconds")}
    with suppress(OSError):  # no room; then a second writer is not told who it is
        (folder / WRITER_NAME).write_text(json.dumps(about), encoding="utf-8")


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / WRITER_NAME).read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
