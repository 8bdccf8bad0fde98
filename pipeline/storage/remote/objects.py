"""Whole remote files and folders: sizes, contents, listings, and files put in their place in one piece."""

import io
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.errors import StorageUnavailableError
from pipeline.storage.remote.byte_ranges import ByteRange, read_ranges
from pipeline.storage.remote.calls import Action, call, call_each
from pipeline.storage.remote.failures import status_of
from pipeline.storage.remote.schemes import is_web

Result = TypeVar("Result")

PIECE_BYTES = 8 << 20
"""A whole file is read in pieces of this size, several at a time."""
PART_BYTES, _PARTS_AT_ONCE, _MAX_PARTS = 8 << 20, 2, 10_000
"""A larger file travels to an object store in parts, so many at once, which become one at its end; S3 limits them."""


def size_of(location: str) -> int:
    """Returns a file's size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the server does not tell.
    """
    return call(location, _size)


def _size(store: Any, path: str) -> int:
    try:
        return int(store.head(path)["size"])
    except Exception as error:
        if status_of(error) not in (403, 405, 501):  # of servers that know no HEAD
            raise
        return int(store.get(path).meta["size"])


def sizes_of(locations: Sequence[str]) -> list[int | None]:
    """Returns the sizes in bytes of many files, asked side by side; None where there is no such file.

    Raises:
        StorageError: a server refuses or fails.
    """
    return [
        None if isinstance(found, FileNotFoundError) else _raised(found)
        for found in call_each(locations, [_size] * len(locations))
    ]


def exists(location: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: nobody can say: the bucket is missing, the server refuses or can't be reached.
    """

    def ask(store: Any, path: str) -> bool:
        with suppress(FileNotFoundError):
            _size(store, path)
            return True
        return not is_web(location) and any(store.list(path))

    try:
        return call(location, ask)
    except IsADirectoryError:
        return True


def read_whole(location: str) -> bytes:
    """Read a whole file: a small one with one request, a large one in pieces side by side, but for web servers.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it can't be read.
    """
    if is_web(location):  # not every server knows ranges
        return call(location, lambda store, path: bytes(store.get(path).bytes()))
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

    def save(store: Any, path: str) -> None:
        for piece in store.get(path).stream(PIECE_BYTES):
            stream.write(piece)

    def save_at(offset: int) -> Action[None]:
        def save_piece(store: Any, path: str) -> None:
            content = store.get_range(path, start=offset, length=min(PIECE_BYTES, size - offset))
            with writing:
                stream.seek(offset)
                stream.write(content)

        return save_piece

    writing = threading.Lock()
    with target.open("wb") as stream:
        if is_web(location):
            call(location, save)
            return
        size = size_of(location)
        offsets = range(0, size, PIECE_BYTES)
        for found in call_each([location] * len(offsets), [save_at(offset) for offset in offsets]):
            _raised(found)


def _pieces(location: str, start: int, end: int) -> list[ByteRange]:
    return [ByteRange(location, offset, min(PIECE_BYTES, end - offset)) for offset in range(start, end, PIECE_BYTES)]


def _raised(found: Result | Exception) -> Result:
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


def list_files(location: str, *, below: bool = False) -> list[tuple[str, int, str]]:
    """List the files inside a folder, or also all below it; an absent folder is empty.

    Returns:
        Of each file its name relative to the folder, its size in bytes, and what changes when its content does.

    Raises:
        StorageError: the bucket is missing, or the server refuses or fails.
    """

    def ask(store: Any, path: str) -> list[tuple[str, int, str]]:
        if below:
            found = [one for some in store.list(path) for one in some]
        else:
            found = store.list_with_delimiter(path)["objects"]
        root = f"{path.rstrip('/')}/"
        return [
            (one["path"].removeprefix(root), one["size"], one["e_tag"] or str(one["last_modified"])) for one in found
        ]

    return call(location, ask)


def upload(source: Path, location: str) -> None:
    """Put a file in its place, in one piece: a reader finds the old one or the new one, never a part.

    A large file travels in parts, which the store joins when the last one is there; after a failure they are dropped.

    Raises:
        StorageError: it could not be put; nothing has changed.
    """
    size = source.stat().st_size
    part = max(PART_BYTES, -(-size // _MAX_PARTS))
    options = {"use_multipart": size > part, "chunk_size": part, "max_concurrency": _PARTS_AT_ONCE}
    try:
        call(location, lambda store, path: store.put(path, source, **options))
    except FileNotFoundError as error:  # of the parts; a bucket that is missing has an error of its own
        raise StorageUnavailableError(
            f"{location}: the server dropped the upload before its last part came. Run the same command again later"
        ) from error


def remove(location: str) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""

    def forget(store: Any, path: str) -> None:
        for paths in ([one["path"] for some in store.list(path) for one in some], [path]):
            with suppress(FileNotFoundError):
                store.delete(paths)

    call(location, forget)
