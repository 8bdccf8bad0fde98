"""Files on a local path or behind an fsspec URL: list, read ranges, publish whole."""

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from pipeline.errors import PipelineError, StorageError, StorageFullError
from pipeline.storage.cache import ShardMirror
from pipeline.storage.descriptors import open_descriptor, opened, read_at
from pipeline.storage.remote import byte_ranges, objects, schemes

LISTING_NAME = "files.json"
"""Says what a folder holds, for readers behind a web server, which can't be asked."""

_URL = re.compile(r"^(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # a scheme of one letter is a drive of Windows
WRITER_LOCK_NAME, WRITER_NAME = ".writer.lock", ".writer.json"
"""In a folder while somebody writes there, see `pipeline.storage.one_writer`; listings pass over them."""
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
    """Returns whether a location is a URL such as `s3://…`; `file://` counts as local."""
    return bool(_URL.match(str(location)))


def local_path(location: str | Path) -> Path:
    """Returns the local path behind a path or a `file://` URL.

    `~/` is the home folder, and `~name` that of a user, unless there is a file so called, or no such user.

    Raises:
        ValueError: `location` is remote.
        PipelineError: the user has no home folder.
    """
    if is_remote(location):
        raise ValueError(f"{location} is not a local path")
    text = str(location)
    if text.lower().startswith("file://"):
        text = text[len("file://") :]
        if PureWindowsPath(text[1:]).drive and issubclass(Path, PureWindowsPath):  # file:///C:/data
            text = text[1:]
    path = Path(text)
    if text.startswith("~") and path.parts[0] != "~" and path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        if path.parts[0] == "~":
            raise PipelineError(f"{text}: this user has no home folder. Set HOME, or give the whole path") from error
        return path


def join_path(folder: str | Path, name: str) -> str:
    """Returns the location of `name` inside `folder`."""
    if is_remote(folder):
        return schemes.join_url(str(folder), name)
    return str(local_path(folder) / name)


def is_same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two locations name the same folder or file, however they are spelled."""
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return local_path(one).resolve() == local_path(other).resolve()


def split_path(location: str | Path) -> tuple[str, str]:
    """Returns the folder that a file or folder lies in, and its name there."""
    if is_remote(location):
        folder, _, name = str(location).rstrip("/").rpartition("/")
        return folder, name
    path = local_path(location)
    return str(path.parent), path.name


def file_name(location: str | Path) -> str:
    """Returns the name of the file at a location, without its folder and without a URL's query."""
    return schemes.url_name(str(location)) if is_remote(location) else local_path(location).name


def exists(location: str | Path) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: the server can't say.
    """
    return objects.exists(str(location)) if is_remote(location) else local_path(location).exists()


def list_files(folder: str | Path, suffix: str = "") -> list[StoredFile]:
    """List the finished files directly inside `folder`, by name; an absent folder is empty.

    A folder behind a web server is known by its `files.json`, see `write_listing`; where names are known from
    elsewhere, `find_files` needs none.

    Raises:
        StorageError: the server refuses, fails, or is a web server and has no `files.json` there.
    """
    if schemes.is_web(folder):
        entries = _read_listing(str(folder))
    elif is_remote(folder):
        entries = [StoredFile(*found) for found in objects.list_files(str(folder))]
    else:
        root = local_path(folder)
        entries = [
            StoredFile(entry.name, stat.st_size, str(stat.st_mtime_ns))
            for entry in (os.scandir(root) if root.is_dir() else ())
            if entry.is_file() and (stat := entry.stat())
        ]
    finished = [entry for entry in entries if entry.name.endswith(suffix) and not is_staged(entry.name)]
    return sorted((entry for entry in finished if entry.name), key=lambda entry: entry.name)


def list_tree(folder: str | Path) -> list[str]:
    """List the finished files inside a folder and all below it, by their names relative to it.

    Raises:
        StorageError: the server refuses or fails, or is a web server.
    """
    if schemes.is_web(folder):
        raise StorageError(f"{folder}: a web server can't be asked what a folder holds")
    if is_remote(folder):
        names = [name for name, *_ in objects.list_files(str(folder), below=True)]
    else:
        root = local_path(folder)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(name for name in names if not is_staged(name))


def is_staged(name: str) -> bool:
    """Returns whether a file is still being written, by its name."""
    return _STAGED in name or name.rpartition("/")[2] in (WRITER_LOCK_NAME, WRITER_NAME)


def find_files(folder: str | Path, names: Sequence[str]) -> list[StoredFile]:
    """Returns which of the named files are in a folder; also behind a web server, which is asked for each.

    Raises:
        StorageError: the server refuses or fails.
    """
    if schemes.is_web(folder):
        sizes = objects.sizes_of([join_path(folder, name) for name in names])
        return [StoredFile(name, size, "") for name, size in zip(names, sizes, strict=True) if size is not None]
    known = {file.name: file for file in list_files(folder)}
    return [known[name] for name in names if name in known]


def write_listing(folder: str | Path) -> None:
    """Write `files.json`, which tells readers behind a web server what the folder holds now."""
    entries = [asdict(entry) for entry in list_files(folder) if entry.name != LISTING_NAME]
    publish_bytes(join_path(folder, LISTING_NAME), json.dumps(entries, indent=0).encode() + b"\n")


def _read_listing(folder: str) -> list[StoredFile]:
    location = join_path(folder, LISTING_NAME)
    try:
        return [
            StoredFile(str(entry["name"]), int(entry["size"]), str(entry["version"]))
            for entry in json.loads(objects.read_whole(location))
        ]
    except FileNotFoundError as error:
        raise StorageError(
            f"{location}: no such file. A web server can't be asked what a folder holds, so `pipeline teacher-logits` "
            f"leaves {LISTING_NAME} in a store: run it again where the store was made, and copy that file, too"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{location}: not a listing of files ({error!r})") from error


def read_bytes(location: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        PipelineError: the file is not there.
        StorageError: it can't be read.
    """
    if is_remote(location):
        with _missing_file_told(location):
            return objects.read_whole(str(location))
    with open_input(location) as stream:
        return stream.read()


@contextmanager
def open_input(location: str | Path, *, whole: bool = False, request_bytes: int = 256 << 10) -> Iterator[BinaryIO]:
    """Open a file for reading in any order.

    Args:
        location: a path or URL.
        whole: fetch a remote file to the local disk first: faster for who reads all of it in an order of their own.
        request_bytes: of a remote file, fetched at a time: more is faster for who reads on and on.

    Raises:
        PipelineError: the file is not there.
        StorageError: it can't be read.
    """
    if is_remote(location) and whole:
        with local_copy(location) as path, path.open("rb") as stream:
            yield stream
        return
    with _missing_file_told(location):
        if is_remote(location):
            stream = objects.open_remote(str(location), buffer_bytes=request_bytes)
        else:
            stream = local_path(location).open("rb")
    with stream:
        yield stream


@contextmanager
def local_copy(location: str | Path) -> Iterator[Path]:
    """Yields a file as a path on this machine for as long as the block lasts; a local file as it is.

    A remote file is copied to a temporary folder under its own name, so nothing stale can be used later.

    Raises:
        PipelineError: the file is not there.
        StorageError: it can't be read, or the local disk is full.
    """
    if not is_remote(location):
        yield local_path(location)
        return
    # Windows removes no file that is still mapped, as safetensors' are while a tensor lives.
    with tempfile.TemporaryDirectory(prefix="fetched-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / (file_name(location) or "file")
        with _missing_file_told(location), lack_of_room_told(path, path):
            objects.download(str(location), path)
        yield path


@contextmanager
def _missing_file_told(location: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PipelineError(f"{location}: no such file") from error
    except IsADirectoryError as error:
        raise PipelineError(f"{location}: is a folder, not a file") from error


@dataclass(frozen=True, slots=True)
class StoredRange:
    """A stretch of a file of a folder."""

    name: str
    """Of the file."""
    offset: int
    size: int
    """Bytes."""
    crc32: int = -1
    """Of the bytes; -1 where nobody knows. Only what is known can be kept in a mirror."""

    def fits(self, content: bytes) -> bool:
        """Whether these are the bytes, as far as anybody knows."""
        return len(content) == self.size and (self.crc32 < 0 or zlib.crc32(content) == self.crc32)


class RangeReader:
    """Reads byte ranges of the files of one folder, many times; keeps local files open.

    Not shared between processes: each loader worker makes its own (an unpickled one starts with no open files).

    Args:
        folder: a path or URL.
        mirror: keeps on the local disk what was read of a remote folder; without it every read asks the server.
    """

    _MAX_OPEN = 64

    def __init__(self, folder: str | Path, mirror: ShardMirror | None = None) -> None:
        self._folder = str(folder)
        self._mirror = mirror if is_remote(folder) else None
        self._descriptors: dict[str, int] = {}
        self._ahead: dict[tuple[str, int, int], bytes | PipelineError] = {}

    def read(self, name: str, offset: int, size: int, crc32: int = -1) -> bytes:
        """Read `size` bytes at `offset` of the file `name`; fewer where the file ends before.

        Raises:
            PipelineError: the file is not there.
        """
        if not is_remote(self._folder):
            return read_at(self._descriptor(name), size, offset)
        found = self._ahead.pop((name, offset, size), None)
        if found is None:
            [found] = self.read_many([StoredRange(name, offset, size, crc32)])
        if isinstance(found, PipelineError):
            raise found
        return found

    def read_ahead(self, wanted: Sequence[StoredRange]) -> None:
        """Fetch at once what the next calls of `read` will ask for; local files are read when they are asked for.

        What an earlier call fetched and nobody took is forgotten.
        """
        if is_remote(self._folder):
            found = self.read_many(wanted)
            self._ahead = {(one.name, one.offset, one.size): what for one, what in zip(wanted, found, strict=True)}

    def read_many(self, wanted: Sequence[StoredRange]) -> list[bytes | PipelineError]:
        """Read many ranges; from a server with a bounded number of requests side by side.

        Returns:
            In their order the bytes, or why they can't be read.
        """
        if not is_remote(self._folder):
            return [self._read_or_error(one) for one in wanted]
        found: list[bytes | PipelineError] = [self._mirrored(one) for one in wanted]
        missing = [place for place, one in enumerate(wanted) if one.size and not found[place]]
        ranges = [
            byte_ranges.ByteRange(join_path(self._folder, one.name), one.offset, one.size)
            for one in (wanted[place] for place in missing)
        ]
        for place, asked, content in zip(missing, ranges, byte_ranges.read_ranges(ranges), strict=True):
            found[place] = _as_pipeline_error(content, asked.location)
            self._keep(wanted[place], content)
        return found

    def _mirrored(self, wanted: StoredRange) -> bytes:
        if self._mirror is None or wanted.crc32 < 0:
            return b""
        content = self._mirror.read(wanted.name, wanted.offset, wanted.size)
        if not wanted.fits(content):
            return b""
        self._mirror.touch(wanted.name)
        return content

    def _keep(self, wanted: StoredRange, content: bytes | Exception) -> None:
        if self._mirror is not None and wanted.crc32 >= 0 and isinstance(content, bytes) and wanted.fits(content):
            self._mirror.write(wanted.name, wanted.offset, content)

    def _read_or_error(self, wanted: StoredRange) -> bytes | PipelineError:
        try:
            return self.read(wanted.name, wanted.offset, wanted.size)
        except PipelineError as error:
            return error
        except OSError as error:
            return StorageError(f"{join_path(self._folder, wanted.name)}: {error.strerror}")

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            if len(self._descriptors) >= self._MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            try:
                self._descriptors[name] = open_descriptor(join_path(self._folder, name), os.O_RDONLY)
            except FileNotFoundError as error:
                raise PipelineError(f"{join_path(self._folder, name)}: no such file") from error
        return self._descriptors[name]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_mirror": self._mirror, "_descriptors": {}, "_ahead": {}}

    def __del__(self) -> None:
        self.close()


def _as_pipeline_error(found: bytes | Exception, location: str) -> bytes | PipelineError:
    if isinstance(found, bytes | PipelineError):
        return found
    return PipelineError(f"{location}: {'no such file' if isinstance(found, FileNotFoundError) else found}")


def check_writable(location: str | Path) -> None:
    """Refuse, before anything is done, a place that nothing can be written to.

    Raises:
        StorageError: it is behind a web server.
    """
    if schemes.is_web(location):
        raise StorageError(
            f"{location}: http and https can only be read. Write to a local folder, s3://, gs://, az:// or hf://"
        )


@contextmanager
def publish(location: str | Path) -> Iterator[Path]:
    """Yields a path to write to; when the block ends without an error, the file appears at `location`, whole.

    Readers see the old file or the new one, never a part: a local file is renamed into place after its bytes are on
    the disk, a remote one is put in one piece. A block that fails leaves nothing behind.

    Raises:
        StorageError: the disk is full, nothing may be written there, or the server refuses.
    """
    check_writable(location)
    if is_remote(location):
        with tempfile.TemporaryDirectory(prefix="publish-") as folder:
            # The suffix stays at the end: writers such as numpy and TensorBoard choose the format by it.
            staged = Path(folder) / f"file{Path(file_name(location)).suffix}"
            with lack_of_room_told(location, staged):
                yield staged
            objects.upload(staged, str(location))
        return
    target = local_path(location)
    staged = target.with_name(f".{target.stem[:100]}{_STAGED}{secrets.token_hex(4)}{target.suffix}")
    try:
        with lack_of_room_told(target, staged):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield staged
            with opened(staged, os.O_RDWR) as descriptor:
                os.fsync(descriptor)
            staged.replace(target)
            with suppress(PermissionError), opened(target.parent, os.O_RDONLY) as folder:  # Windows opens no folders
                os.fsync(folder)
    finally:
        with suppress(NotADirectoryError):
            staged.unlink(missing_ok=True)


_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not grow so large",
}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_PROBE_BYTES = 64 << 10


@contextmanager
def lack_of_room_told(target: str | Path, staged: Path | None = None) -> Iterator[None]:
    """Turn an error that comes from a full or forbidden disk into one line, whoever was writing.

    Args:
        target: the file that is meant, for the message.
        staged: the half-written file, which is given up after an error: where that says nothing, more is written there
            to learn why.

    Raises:
        StorageFullError: there is no room.
        StorageError: it is not allowed.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        number = _errno_of(error) or (_why_nothing_more_fits(staged) if staged else None)
        if number in _NO_ROOM:
            raise StorageFullError(
                f"{target}: there is no room left to write it ({_NO_ROOM[number]}). Nothing half-written is left; make "
                "room, or write elsewhere, and run the same command again"
            ) from error
        place = getattr(error, "filename", None)
        if number in _NOT_ALLOWED and place and str(staged or target).startswith(str(place)):
            raise StorageError(f"{target}: can't be written ({os.strerror(number)}: {place})") from error
        raise


def _errno_of(error: Exception) -> int | None:
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, which takes its broken file away
    return int(rust.group(1)) if rust else getattr(error, "errno", None)


def _why_nothing_more_fits(staged: Path) -> int | None:
    """Ask the disk itself: torch and NumPy say only that a write failed."""
    try:
        with staged.open("ab") as stream:
            stream.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno
    return None


def publish_bytes(location: str | Path, content: bytes) -> None:
    """Write a small file, whole."""
    with publish(location) as staged:
        staged.write_bytes(content)


def move(source: str | Path, target: str | Path) -> None:
    """Move a file to another name beside or below its folder; both local, or both remote."""
    if is_remote(source):
        with local_copy(source) as path, publish(target) as staged:
            shutil.copyfile(path, staged)
        remove(source)
        return
    local_path(target).parent.mkdir(parents=True, exist_ok=True)
    local_path(source).replace(local_path(target))


def remove(location: str | Path) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""
    check_writable(location)
    if is_remote(location):
        objects.remove(str(location))
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
