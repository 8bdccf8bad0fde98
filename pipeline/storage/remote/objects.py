"""Whole remote files and folders: sizes, contents, listings, and files put in their place in one piece."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import fsspec.asyn

from pipeline.errors import StorageError
from pipeline.storage.remote.byte_ranges import ByteRange, read_ranges
from pipeline.storage.remote.calls import CONCURRENCY, call
from pipeline.storage.remote.schemes import is_web, scheme_of

PIECE_BYTES = 8 << 20
"""A whole file is read in pieces of this size, several at a time."""
PART_BYTES = 64 << 20
"""A file of more than twice this size travels to S3 in parts of it."""


def size_of(location: str) -> int:
    """Give a file's size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the server does not tell.
    """
    info = call(location, _web_info if is_web(location) else lambda filesystem, path: filesystem.info(path))
    if info.get("type") == "directory":
        raise IsADirectoryError(location)
    if info.get("size") is None:
        raise StorageError(f"{location}: the server does not say how long the file is, so it can't be read by ranges")
    return int(info["size"])


def sizes_of(locations: Sequence[str]) -> list[int | None]:
    """Give the sizes in bytes of many files, asked side by side; None where there is no such file.

    Raises:
        StorageError: a server refuses or fails.
    """

    def ask(location: str) -> int | None:
        try:
            return size_of(location)
        except (FileNotFoundError, IsADirectoryError):
            return None

    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="sizes") as threads:
        return list(threads.map(ask, locations))


def exists(location: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: nobody can say: the bucket is missing, the server refuses or can't be reached.
    """
    try:
        call(location, _web_info if is_web(location) else lambda filesystem, path: filesystem.info(path))
    except FileNotFoundError:
        return False
    return True


def _web_info(filesystem: Any, url: str) -> dict[str, Any]:
    # fsspec's own answer takes every failure for an absent file.
    async def ask() -> dict[str, Any]:
        session = await filesystem.set_session()
        for method in ("HEAD", "GET"):  # some servers know no HEAD
            headers = {"Accept-Encoding": "identity"}
            request = session.request(method, filesystem.encode_url(url), allow_redirects=True, headers=headers)
            async with request as response:
                if method == "HEAD" and response.status in (403, 405, 501):
                    continue
                response.raise_for_status()
                return {"size": response.headers.get("Content-Length"), "type": "file"}
        raise AssertionError("GET either answers or raises")

    return cast("dict[str, Any]", fsspec.asyn.sync(filesystem.loop, ask))


def read_whole(location: str) -> bytes:
    """Read a whole file: a small one with one request, a large one in pieces side by side.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it can't be read.
    """
    first = _raised(read_ranges([ByteRange(location, 0, PIECE_BYTES)])[0])
    if len(first) != PIECE_BYTES:
        return first
    pieces = _pieces(location, PIECE_BYTES, size_of(location))
    return b"".join([first, *(_raised(piece) for piece in read_ranges(pieces))])


def download(location: str, target: Path) -> None:
    """Copy a file to the disk; memory holds some pieces of it at most.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it can't be read.
    """
    if is_web(location):  # not every server knows ranges
        call(location, lambda filesystem, path: filesystem.get_file(path, str(target)))
        return
    pieces = _pieces(location, 0, size_of(location))
    with target.open("wb") as stream:
        for start in range(0, len(pieces), CONCURRENCY):
            for piece in read_ranges(pieces[start : start + CONCURRENCY]):
                stream.write(_raised(piece))


def _pieces(location: str, start: int, end: int) -> list[ByteRange]:
    return [ByteRange(location, offset, min(PIECE_BYTES, end - offset)) for offset in range(start, end, PIECE_BYTES)]


def _raised(found: bytes | Exception) -> bytes:
    if isinstance(found, Exception):
        raise found
    return found


class RemoteFile(io.RawIOBase):
    """A remote file that is read in any order, by ranges; every read is tried again where the connection fails."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._size = size_of(location)
        self._place = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Give the place of the next read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, from the file's beginning, here, or its end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as the buffer takes, or as are left."""
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        content = b"".join(
            _raised(piece) for piece in read_ranges(_pieces(self._location, self._place, self._place + wanted))
        )
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def open_remote(location: str, *, buffer_bytes: int = 256 << 10) -> BinaryIO:
    """Open a remote file for reading in any order.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it can't be read.
    """
    return cast("BinaryIO", io.BufferedReader(RemoteFile(location), buffer_bytes))


def list_folder(location: str) -> list[dict[str, Any]]:
    """List what is directly inside a folder, as fsspec describes it; an absent folder is empty.

    Raises:
        StorageError: the bucket is missing, or the server refuses or fails.
    """
    try:
        return cast("list[dict[str, Any]]", call(location, lambda filesystem, path: filesystem.ls(path, detail=True)))
    except FileNotFoundError:
        return []


def list_tree(location: str) -> list[str]:
    """List the files inside a folder and all below it, relative to it; an absent folder is empty.

    Raises:
        StorageError: the bucket is missing, or the server refuses or fails.
    """

    def find(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
        found = cast("list[str]", filesystem.find(path))
        root = path.rstrip("/") + "/"
        return [name.removeprefix(root) for name in found if name.startswith(root)]

    try:
        return call(location, find)
    except FileNotFoundError:
        return []


def upload(source: Path, location: str) -> None:
    """Put a file in its place, in one piece: a reader finds the old one or the new one, never a part.

    A large file travels in parts, which the store joins when the last one is there; after a failure they are dropped.

    Raises:
        StorageError: it could not be put; nothing has changed.
    """
    options: dict[str, Any] = {"chunksize": PART_BYTES} if scheme_of(location).name == "s3" else {}
    call(location, lambda filesystem, path: filesystem.put_file(str(source), path, **options))


def remove(location: str) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""

    def forget(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    try:
        call(location, forget)
    except FileNotFoundError:
        return
