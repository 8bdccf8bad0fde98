"""Object stores and web servers behind fsspec: connections, retries, byte ranges, and errors in one clear line.

The only module that knows fsspec. Every request goes through `call` or `read_ranges`, so that one rule decides what is
tried again and one place says what went wrong.
"""

import io
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, urlsplit

import fsspec
import fsspec.asyn

from pipeline.errors import PipelineError, StorageError, StorageUnavailableError, UsageError

CONCURRENCY = 16
"""Requests under way at the same time, in each process."""
PIECE_BYTES = 8 << 20
"""A whole file is read in pieces of this size, several at a time."""
PART_BYTES = 64 << 20
"""A file of more than twice this size travels to S3 in parts of it."""
MERGE_GAP_BYTES = 64 << 10
"""Ranges of one file that lie closer than this share a request, which costs as much as some hundred kB."""
_MOST_MERGED_BYTES = PIECE_BYTES
_TRIES = 8
"""How often a request is sent to a server that answers, but not well: 25 s of waiting in all."""
_TRIES_TO_CONNECT = 4
"""How often a connection is tried that does not come about; a wrong address should be known soon."""
_FIRST_PAUSE_SECONDS = 0.2
_CONNECT_SECONDS, _READ_SECONDS = 10, 60

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# By name, so that nobody has to import the packages of schemes that are not in use.
_CONNECTION_ERRORS = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError", "ConnectError"}
)
_CUT_ERRORS = frozenset(
    (
        *("HTTPClientError", "ResponseParserError", "FlexibleChecksumError", "IncompleteRead"),  # botocore, urllib3
        *("ClientConnectionError", "ClientPayloadError", "TransportError"),  # aiohttp, httpx
        *("ConnectionError", "TimeoutError", "FSTimeoutError"),
    )
)

_log = logging.getLogger(__name__)
_chance = random.Random()  # not the global one, which belongs to whoever seeded it
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A stretch of a file."""

    location: str
    offset: int
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    name: str
    extra: str
    """What to install."""
    credentials: str
    """Where they are looked for."""
    endpoint: str
    """Environment variables that decide which server is asked."""
    environment: tuple[str, ...] = ()
    """A change of one of these makes a new connection."""
    repeats: bool = False
    """Whether its package tries again by itself, for long enough."""


_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")
_SCHEMES = {
    "s3": _Scheme(
        "s3",
        "pip install 'audioset-distill[s3]'",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role; FSSPEC_S3_ANON=true reads "
        "public buckets without any",
        "AWS_ENDPOINT_URL",
        (*_AWS, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ANON"),
    ),
    "gs": _Scheme(
        "gs",
        "pip install 'audioset-distill[gcs]'",
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's role",
        "STORAGE_EMULATOR_HOST",
        ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"),
        repeats=True,
    ),
    "hf": _Scheme(
        "hf",
        "pip install huggingface_hub",
        "HF_TOKEN, or `hf auth login`",
        "HF_ENDPOINT",
        ("HF_TOKEN", "HF_ENDPOINT"),
    ),
    "http": _Scheme("http", "pip install aiohttp", "~/.netrc, or the URL itself", "HTTP_PROXY"),
    "memory": _Scheme("memory", "", "nothing", "nothing"),
}
_ALIASES = {"https": "http", "s3a": "s3", "gcs": "gs"}

# Kept for ever, and under the process's number: a forked loader worker makes its own connections, and must not close
# those that it inherited, for that would take the parent's sockets out of the event loop that both see.
_filesystems: dict[tuple[object, ...], fsspec.AbstractFileSystem] = {}


def is_web(location: str | Path) -> bool:
    """Tell `http://…` and `https://…`, which can be read only and whose folders can't be listed."""
    return str(location).lower().startswith(("http://", "https://"))


def join_url(folder: str, name: str) -> str:
    """Give the URL of `name` inside a folder; a query, such as an access token, stays at the end."""
    if not is_web(folder):
        return f"{folder.rstrip('/')}/{name}"
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def url_name(location: str) -> str:
    """Give the name of the file behind a URL, without a query."""
    return urlsplit(location).path.rstrip("/").rsplit("/", 1)[-1] if is_web(location) else location.rsplit("/", 1)[-1]


def resolve(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Give the file system of a URL, connected once in each process, and the path that it knows the file by.

    Raises:
        UsageError: the scheme is unknown, its package is missing, or the URL holds credentials where it may not.
    """
    scheme = _scheme_of(location)
    if scheme.name in ("s3", "gs") and "@" in urlsplit(location).netloc:
        raise UsageError(f"{location}: credentials don't belong into a URL. Give them by {scheme.credentials}")
    key = (os.getpid(), scheme.name, *map(os.environ.get, scheme.environment))
    if key not in _filesystems:
        try:
            _filesystems[key] = fsspec.filesystem(scheme.name, **_options(scheme.name))
        except ImportError as error:
            raise UsageError(
                f"{location}: this kind of URL needs another package ({error}). Install it: {scheme.extra}"
            ) from error
        except ValueError as error:
            raise UsageError(f"{location}: {error}. s3://, gs://, hf:// and https:// are known") from error
        except Exception as error:
            raise _explain(error, location) from error
        if scheme.name == "s3":
            _filesystems[key].retries = 1  # botocore repeats a request, `call` the rest  # pyright: ignore
    filesystem = _filesystems[key]
    return filesystem, cast("str", filesystem._strip_protocol(location))


def _scheme_of(location: str) -> _Scheme:
    protocol = location.split("://", 1)[0].lower()
    unknown = _Scheme(protocol, "its fsspec package", "what its fsspec package reads", "its fsspec package's settings")
    return _SCHEMES.get(_ALIASES.get(protocol, protocol), unknown)


def _options(scheme: str) -> dict[str, Any]:
    # A listing that is kept would not show what other processes publish.
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        config = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": CONCURRENCY,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        }
        if "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
            # Servers other than Amazon's send the whole object's checksum with a range of it. Clips have their own.
            config["response_checksum_validation"] = "when_required"
        return {**fresh, "config_kwargs": config, "max_concurrency": CONCURRENCY // 2}
    if scheme == "http":
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        # URLs are taken as they are: spelling `%2F` anew breaks signatures. `trust_env` reads ~/.netrc and proxies.
        return {**fresh, "client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
    if scheme == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises all the same
    return {} if scheme == "memory" else fresh


def call(location: str, action: Callable[[fsspec.AbstractFileSystem, str], Result]) -> Result:
    """Do something with a file, again where the server or the network fails for the moment.

    Args:
        location: the URL.
        action: given the file system and the path; may be called several times.

    Raises:
        FileNotFoundError: nothing is there.
        StorageUnavailableError: the server can't be reached, or keeps failing.
        StorageError: it refuses, for instance for want of credentials.
    """
    filesystem, path = resolve(location)
    for attempt in itertools.count(1):
        try:
            return action(filesystem, path)
        except PipelineError:
            raise
        except Exception as error:
            if attempt >= _tries_for(error, location):
                raise _explain(error, location) from error
            _pause(error, attempt, location)
    raise AssertionError("counting never ends")


def _pause(error: BaseException, attempt: int, location: str) -> None:
    """Wait before the next try, each time twice as long."""
    tries = _tries_for(error, location)
    # Up to half of it by chance, so that processes that failed together don't come back together.
    seconds = _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * (1 - _chance.random() / 2)
    level = logging.DEBUG if attempt < 3 else logging.WARNING
    _log.log(level, "%s: %s; try %d of %d in %.1f s", location, _in_words(error), attempt + 1, tries, seconds)
    time.sleep(seconds)


def _tries_for(error: BaseException, location: str) -> int:
    if _scheme_of(location).repeats:
        return 1
    if _is_a(error, _CONNECTION_ERRORS):
        return _TRIES_TO_CONNECT
    status = _status_of(error)
    if status in _RETRIED_STATUS or _code_of(error) in ("SlowDown", "InternalError", "RequestTimeout"):
        return _TRIES
    return _TRIES if status is None and _is_a(error, _CUT_ERRORS) else 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__ or error


def _is_a(error: BaseException, names: frozenset[str]) -> bool:
    return any(kind.__name__ in names for one in _chain(error) for kind in type(one).__mro__)


def _status_of(error: BaseException) -> int | None:
    """Find the HTTP status that an error of any of the packages goes back to."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        found = (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode")  # botocore
            if isinstance(response, dict)
            else getattr(response, "status_code", None)  # httpx
        )
        if type(one).__name__ == "ClientResponseError":  # aiohttp; its other errors have numbers that are no answers
            found = getattr(one, "status", None)
        if type(one).__name__ == "HttpError":  # gcsfs
            found = getattr(one, "code", None)
        if found is not None and str(found).isdigit():
            return int(found)
    return None


def _code_of(error: BaseException) -> str:
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _in_words(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _explain(error: BaseException, location: str) -> Exception:
    """Say what went wrong and how to mend it; a file that is not there stays a FileNotFoundError."""
    scheme = _scheme_of(location)
    status, code, words = _status_of(error), _code_of(error), _in_words(error)
    if code == "NoSuchBucket":
        bucket = urlsplit(location).netloc
        return StorageError(
            f"{location}: there is no bucket {bucket!r} at {_server(scheme)}. Make it, or correct the name"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(location)
    if _is_a(
        error,
        frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}),
    ):
        return StorageError(f"{location}: no credentials ({words}). Give them by {scheme.credentials}")
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError(
            f"{location}: permission denied ({code or status or words}). Credentials come from {scheme.credentials}"
        )
    if _is_a(error, _CONNECTION_ERRORS):
        return StorageUnavailableError(
            f"{location}: can't connect to {_server(scheme, location)} ({words}). Check the network, and "
            f"{scheme.endpoint}"
        )
    if status in _RETRIED_STATUS or _is_a(error, _CUT_ERRORS):
        server, tries = _server(scheme, location), _tries_for(error, location)
        what = f"answers {status}" if status else "cuts the connection or does not answer"
        return StorageUnavailableError(
            f"{location}: {server} {what} ({words}), {tries} times in a row. Run the same command again later"
        )
    return StorageError(f"{location}: {words}")


def _server(scheme: _Scheme, location: str = "") -> str:
    if scheme.name == "http":
        return urlsplit(location).netloc
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if scheme.name == "s3" else (scheme.endpoint,)
    return next((os.environ[name] for name in names if os.environ.get(name)), f"the {scheme.name}:// service")


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


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    """Read many stretches at the same time; near ones of a file share a request.

    Returns:
        For each range its bytes, fewer where the file ends before, or what went wrong with it: a FileNotFoundError, a
        StorageError.
    """
    found: list[bytes | Exception] = [b""] * len(ranges)
    groups = _merged(ranges)
    for group, content in zip(groups, _fetch([group.range for group in groups]), strict=True):
        for place in group.members:
            wanted = ranges[place]
            start = wanted.offset - group.range.offset
            found[place] = content if isinstance(content, Exception) else content[start : start + wanted.size]
    return found


@dataclass(slots=True)
class _Group:
    range: ByteRange
    members: list[int]


def _merged(ranges: Sequence[ByteRange]) -> list[_Group]:
    groups: list[_Group] = []
    for place in sorted(range(len(ranges)), key=lambda place: (ranges[place].location, ranges[place].offset)):
        wanted = ranges[place]
        last = groups[-1] if groups else None
        if last is not None and last.range.location == wanted.location:
            begin, end = last.range.offset, last.range.offset + last.range.size
            new_end = max(end, wanted.offset + wanted.size)
            if wanted.offset - end <= MERGE_GAP_BYTES and (
                new_end - begin <= _MOST_MERGED_BYTES or wanted.offset < end
            ):
                last.range = ByteRange(wanted.location, begin, new_end - begin)
                last.members.append(place)
                continue
        groups.append(_Group(wanted, [place]))
    return groups


def _fetch(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    found: list[bytes | Exception] = [b""] * len(ranges)
    left = [place for place, wanted in enumerate(ranges) if wanted.size > 0]
    for attempt in itertools.count(1):
        answers = _send([ranges[place] for place in left])
        again: list[int] = []
        worst: Exception | None = None
        for place, answer in zip(left, answers, strict=True):
            if isinstance(answer, Exception) and attempt < _tries_for(answer, ranges[place].location):
                again.append(place)
                worst = answer
            elif isinstance(answer, Exception):
                beyond_end = _status_of(answer) == 416 or _code_of(answer) == "InvalidRange"
                found[place] = b"" if beyond_end else _explain(answer, ranges[place].location)
            else:
                found[place] = _checked(answer, ranges[place])
        left = again
        if worst is None:
            break
        _pause(worst, attempt, ranges[left[0]].location)
    return found


def _send(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    """Send a request for each range, a bounded number at a time."""
    if not ranges:
        return []
    filesystem, _ = resolve(ranges[0].location)
    paths = [resolve(wanted.location)[1] for wanted in ranges]
    ends = [wanted.offset + wanted.size for wanted in ranges]
    if filesystem.async_impl:
        starts = [wanted.offset for wanted in ranges]
        return cast("Any", filesystem).cat_ranges(paths, starts, ends, on_error="return", batch_size=CONCURRENCY)

    def read(place: int) -> bytes | Exception:
        try:
            with filesystem.open(paths[place], "rb", cache_type="none") as stream:
                stream.seek(ranges[place].offset)
                return cast("bytes", stream.read(ranges[place].size))
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(CONCURRENCY, len(ranges))) as threads:
        return list(threads.map(read, range(len(ranges))))


def _checked(answer: bytes, wanted: ByteRange) -> bytes | Exception:
    if len(answer) <= wanted.size:
        return answer
    if wanted.offset == 0:
        return answer  # the whole file, which whoever asked for its beginning can use
    return StorageError(
        f"{wanted.location}: the server ignores byte ranges and sends the whole file. Use a server that knows them "
        "(nginx, Apache, Caddy, any object store), or copy the folder here"
    )


def read_whole(location: str) -> bytes:
    """Read a whole file: a small one with one request, a large one in pieces side by side.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it can't be read.
    """
    first = _raised(read_ranges([ByteRange(location, 0, PIECE_BYTES)])[0], location)
    if len(first) != PIECE_BYTES:
        return first
    pieces = _pieces(location, PIECE_BYTES, size_of(location))
    return b"".join([first, *(_raised(piece, location) for piece in read_ranges(pieces))])


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
                stream.write(_raised(piece, location))


def _pieces(location: str, start: int, end: int) -> list[ByteRange]:
    return [ByteRange(location, offset, min(PIECE_BYTES, end - offset)) for offset in range(start, end, PIECE_BYTES)]


def _raised(found: bytes | Exception, location: str) -> bytes:
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
            _raised(piece, self._location)
            for piece in read_ranges(_pieces(self._location, self._place, self._place + wanted))
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
    options: dict[str, Any] = {"chunksize": PART_BYTES} if _scheme_of(location).name == "s3" else {}
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
