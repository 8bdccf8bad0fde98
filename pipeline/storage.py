"""Files on a local path or behind an fsspec URL: list, read ranges, publish whole."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from pipeline.errors import PipelineError

_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_STAGED = ".staged-"
"""In the name of every file that is not finished; listings pass over it."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One finished file of a folder."""

    name: str
    """Relative to the folder that was listed."""
    size: int
    """Bytes."""
    version: str
    """Changes when the content does: an ETag, or the modification time."""


def is_remote(location: str | Path) -> bool:
    """Tell a URL such as `s3://…` from a local path; `file://` counts as local."""
    text = str(location)
    return bool(_URL.match(text)) and not text.startswith("file://")


def local_path(location: str | Path) -> Path:
    """Give the local path behind a path or a `file://` URL; `~` is the home folder.

    Raises:
        ValueError: `location` is remote.
    """
    if is_remote(location):
        raise ValueError(f"{location} is not a local path")
    return Path(str(location).removeprefix("file://")).expanduser()


def join_path(folder: str | Path, name: str) -> str:
    """Give the location of `name` inside `folder`."""
    if is_remote(folder):
        return f"{str(folder).rstrip('/')}/{name}"
    return str(local_path(folder) / name)


def exists(location: str | Path) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(location):
        return local_path(location).exists()
    filesystem, path = _resolve(location)
    return bool(filesystem.exists(path))


def list_files(folder: str | Path, suffix: str = "") -> list[StoredFile]:
    """List the finished files directly inside `folder`, by name; an absent folder is empty."""
    filesystem, path = _resolve(folder)
    if not is_remote(folder):
        root = local_path(folder)
        entries = [
            StoredFile(entry.name, stat.st_size, str(stat.st_mtime_ns))
            for entry in (os.scandir(root) if root.is_dir() else ())
            if entry.is_file() and (stat := entry.stat())
        ]
    else:
        try:
            infos = cast("list[dict[str, Any]]", filesystem.ls(path, detail=True))
        except FileNotFoundError:
            infos = []
        entries = [
            StoredFile(info["name"].rsplit("/", 1)[-1], int(info["size"] or 0), _version(info))
            for info in infos
            if info["type"] == "file"
        ]
    finished = [entry for entry in entries if entry.name.endswith(suffix) and _STAGED not in entry.name]
    return sorted(finished, key=lambda entry: entry.name)


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "LastModified", "mtime", "last_modified"):
        if info.get(key):
            return str(info[key])
    return ""


def read_bytes(location: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        PipelineError: the file is not there.
    """
    with open_input(location) as stream:
        return stream.read()


@contextmanager
def open_input(location: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading in any order.

    Raises:
        PipelineError: the file is not there.
    """
    try:
        if is_remote(location):
            filesystem, path = _resolve(location)
            stream = cast("BinaryIO", filesystem.open(path, "rb"))
        else:
            stream = local_path(location).open("rb")
    except FileNotFoundError as error:
        raise PipelineError(f"{location}: no such file") from error
    except IsADirectoryError as error:
        raise PipelineError(f"{location}: is a folder, not a file") from error
    with stream:
        yield stream


class RangeReader:
    """Reads byte ranges of the files of one folder, many times; keeps local files open.

    Not shared between processes: each loader worker makes its own (an unpickled one starts with no open files).
    """

    _MOST_OPEN = 64

    def __init__(self, folder: str | Path) -> None:
        self._folder = str(folder)
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of the file `name`; fewer where the file ends before.

        Raises:
            PipelineError: the file is not there.
        """
        if is_remote(self._folder):
            filesystem, path = _resolve(join_path(self._folder, name))
            try:
                return cast("bytes", filesystem.cat_file(path, start=offset, end=offset + size))
            except FileNotFoundError as error:
                raise PipelineError(f"{join_path(self._folder, name)}: no such file") from error
        return os.pread(self._descriptor(name), size, offset)

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            if len(self._descriptors) >= self._MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            try:
                self._descriptors[name] = os.open(join_path(self._folder, name), os.O_RDONLY)
            except FileNotFoundError as error:
                raise PipelineError(f"{join_path(self._folder, name)}: no such file") from error
        return self._descriptors[name]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_descriptors": {}}

    def __del__(self) -> None:
        self.close()


@contextmanager
def publish(location: str | Path) -> Iterator[Path]:
    """Give a path to write to; when the block ends without an error, the file appears at `location`, whole.

    Readers see the old file or the new one, never a part: a local file is renamed into place after its bytes are on
    the disk, a remote one is put in one piece. A block that fails leaves nothing behind.
    """
    if is_remote(location):
        with tempfile.TemporaryDirectory(prefix="publish-") as folder:
            staged = Path(folder) / "file"
            yield staged
            filesystem, path = _resolve(location)
            filesystem.put_file(str(staged), path)
        return
    target = local_path(location)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end: writers such as numpy and TensorBoard choose the format by it.
    staged = target.with_name(f".{target.stem[:100]}{_STAGED}{secrets.token_hex(4)}{target.suffix}")
    try:
        yield staged
        _flush_to_disk(staged)
        staged.replace(target)
        _flush_to_disk(target.parent)
    finally:
        staged.unlink(missing_ok=True)


def publish_bytes(location: str | Path, content: bytes) -> None:
    """Write a small file, whole."""
    with publish(location) as staged:
        staged.write_bytes(content)


def remove(location: str | Path) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""
    if is_remote(location):
        filesystem, path = _resolve(location)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)
        return
    path = local_path(location)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_staged(folder: str | Path) -> None:
    """Remove what killed writers left in a local folder. Call it only where no other writer is at work."""
    if not is_remote(folder) and (root := local_path(folder)).is_dir():
        for path in root.iterdir():
            if path.name.startswith(".") and _STAGED in path.name:
                path.unlink(missing_ok=True)


def _resolve(location: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return url_to_fs(str(location))
    except ImportError as error:
        raise PipelineError(
            f"{location}: reading this kind of URL needs another package ({error}). "
            "For s3:// install the extra: pip install 'audioset-distill[s3]'"
        ) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
