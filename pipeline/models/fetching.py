"""Fetches one file over HTTP, whole or not at all: goes on where a broken download stopped, and says what went wrong.

Bytes gather in a hidden file beside the target and become the target once all are there. Several processes that want
the same file wait for the one that fetches it. Proxies are those of the environment (`https_proxy`, `no_proxy`).
"""

import logging
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from filelock import FileLock, Timeout

from pipeline.errors import CheckpointError
from pipeline.runtime.progress import progress_bar
from pipeline.runtime.watching import LOOK_SECONDS, PATIENCE_SECONDS, Watch

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_MEGABYTE = 1_000_000
_WORTH_ANOTHER_TRY = {408, 416, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that pass; after 416 (range not satisfiable) the download starts over."""


SILENCE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to put up with a bad connection."""

    tries: int = 4
    """Tries in a row that bring no new byte before giving up."""
    first_wait_seconds: float = 1.0
    """Wait before the second try; doubled for each one after it."""
    silence_seconds: float = SILENCE_SECONDS
    """How long a server may say nothing."""


class _InterruptedError(Exception):
    """The connection or the server failed; another try may go further."""


def download(
    url: str, target: Path, *, check: Callable[[Path], None] = lambda path: None, patience: Patience | None = None
) -> None:
    """Fetch a file unless it is there already.

    Args:
        url: http or https.
        target: where it goes; the folder is made.
        check: looks at the finished bytes before they get the target's name, and raises a CheckpointError if they are
            no good; they are then deleted.
        patience: how long to put up with a bad connection.

    Raises:
        CheckpointError: the file isn't to be had, or can't be written. What has arrived is kept, unless it is no good,
            and the next call goes on from there.
    """
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = _Partial(target)
    with _alone(partial):
        if target.exists():  # another process was faster
            return
        _receive_all(url, partial, patience or Patience())
        try:
            check(partial.path)
        except CheckpointError as error:
            partial.forget()
            raise CheckpointError(f"{url}: what the server sent is no good: {error}") from error
        with _writing(target):
            partial.publish()


class _Partial:
    """The bytes of an unfinished download, and the mark by which the server knows which version they are of."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.partial")
        self._version = target.with_name(f".{target.name}.partial-version")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def range_headers(self) -> dict[str, str]:
        """Returns the headers that ask for the rest; a server whose file has changed since then sends all of it."""
        if not self.size or not self._version.exists():
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self._version.read_text(encoding="utf-8")}

    def start_over(self, version: str | None) -> None:
        self.forget()
        if version is not None:
            self._version.write_text(version, encoding="utf-8")

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)

    def publish(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.path.replace(self.target)
        self._version.unlink(missing_ok=True)


def _receive_all(url: str, partial: _Partial, patience: Patience) -> None:
    """Try again until all bytes are there, or there is no more patience."""
    failures, furthest = 0, partial.size
    while True:
        try:
            return _receive(url, partial, patience.silence_seconds)
        except _InterruptedError as error:
            # Bytes that came before don't count as progress: a server may promise more than it has, for ever.
            failures = 1 if partial.size > furthest else failures + 1
            furthest = max(furthest, partial.size)
            if failures >= patience.tries:
                advice = f"{_megabytes(partial.size)} are here and the same command goes on from there. {_BY_HAND}"
                raise CheckpointError(f"{url}: can't be fetched: {error}. {advice}") from error
            _log.warning("%s: %s; trying again", url, error)
        time.sleep(patience.first_wait_seconds * 2 ** (failures - 1))


def _receive(url: str, partial: _Partial, silence_seconds: float) -> None:
    """Fetch what is missing in one connection.

    Raises:
        _InterruptedError: it broke, or the server can't answer now.
        CheckpointError: the server refuses, can't be reached, or the disk is full.
    """
    headers = {"User-Agent": "audioset-distill", "Accept-Encoding": "identity", **partial.range_headers()}
    with _connection(url, headers, partial, silence_seconds) as response:
        if response.status == 206 and _first_byte(response) != partial.size:
            partial.forget()
            raise _InterruptedError("the server sent another part of the file than it was asked for")
        with _writing(partial.target):
            if response.status != 206:
                partial.start_over(response.headers["ETag"] or response.headers["Last-Modified"])
            file = partial.path.open("ab")
        announced = response.headers["Content-Length"]
        total = None if announced is None else partial.size + int(announced)
        with _writing(partial.target), file:
            _check_space(partial, total)
            _copy(response, file, partial.target.name, partial.size, total)
    if total is not None and partial.size < total:
        raise _InterruptedError(f"the connection broke after {_megabytes(partial.size)} of {_megabytes(total)}")


@contextmanager
def _connection(url: str, headers: dict[str, str], partial: _Partial, silence_seconds: float) -> Iterator[HTTPResponse]:
    try:
        with _open(urllib.request.Request(url, headers=headers), silence_seconds) as response:
            yield response
    except HTTPError as error:
        if error.code == 416:
            partial.forget()
        answer = f"the server answered {error.code} {error.reason}"
        if error.code in _WORTH_ANOTHER_TRY:
            raise _InterruptedError(answer) from error
        raise CheckpointError(f"{url}: can't be fetched: {answer}. {_BY_HAND}") from error
    except URLError as error:  # no connection came about
        if isinstance(error.reason, TimeoutError):
            raise _InterruptedError("the server did not answer in time") from error
        raise _unreachable(url, error) from error
    except (HTTPException, ConnectionError, TimeoutError) as error:
        raise _InterruptedError(f"the connection broke ({error or type(error).__name__})") from error


def ask_host(url: str) -> None:
    """Returns whether the host of a file can be reached at all, whatever it answers.

    Raises:
        CheckpointError: it can't.
    """
    try:
        _open(urllib.request.Request(url, method="HEAD"), SILENCE_SECONDS).close()
    except HTTPError as error:
        error.close()
    except URLError as error:
        raise _unreachable(url, error) from error
    except (HTTPException, OSError) as error:
        raise CheckpointError(f"{url}: the connection broke ({error or type(error).__name__}). {_BY_HAND}") from error


def _open(request: urllib.request.Request, silence_seconds: float) -> HTTPResponse:
    # A new opener each time: `urlopen` would keep the proxies of its first call.
    return urllib.request.build_opener().open(request, timeout=silence_seconds)


def _unreachable(url: str, error: URLError) -> CheckpointError:
    return CheckpointError(
        f"{url}: {urllib.request.Request(url).host} can't be reached ({error.reason}). Is there a network, or a proxy "
        f"to name in https_proxy? {_BY_HAND}"
    )


_BY_HAND = "Or fetch the file elsewhere and give it instead of its name."


def _first_byte(response: HTTPResponse) -> int | None:
    """Where the sent range begins: `bytes 100-199/200` → 100."""
    begin = (response.headers["Content-Range"] or "").removeprefix("bytes ").partition("-")[0]
    return int(begin) if begin.isdigit() else None


def _copy(response: HTTPResponse, file: Any, name: str, done: int, total: int | None) -> None:
    megabytes = None if total is None else total // _MEGABYTE
    with progress_bar(f"fetching {name}", megabytes, done=done // _MEGABYTE, unit="MB") as bar:
        while chunk := _read(response):
            file.write(chunk)
            bar.advance((done + len(chunk)) // _MEGABYTE - done // _MEGABYTE)
            done += len(chunk)


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except OSError as error:  # otherwise it would pass for trouble with the disk
        raise _InterruptedError(f"the connection broke ({error})") from error


def _check_space(partial: _Partial, total: int | None) -> None:
    """Check that the disk has room for the rest before it is filled to the brim."""
    free = shutil.disk_usage(partial.path.parent).free
    missing = 0 if total is None else total - partial.size
    if missing > free:
        raise CheckpointError(
            f"{partial.target}: needs {_megabytes(missing)}, but only {_megabytes(free)} are free there. Make room, or "
            "choose another folder with TORCH_HOME."
        )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: can't be written ({error.strerror or error}). What has arrived is kept; make room, or choose "
            "another folder with TORCH_HOME."
        ) from error


@contextmanager
def _alone(partial: _Partial) -> Iterator[None]:
    """Let one process at a time, on this machine, fetch a file. The lock dies with its process.

    Raises:
        CheckpointError: another process has it, and brings nothing any more.
    """
    target = partial.target
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with _writing(target):
        if not _acquire(lock, 0):
            _log.info("%s: another process is fetching it; waiting", target.name)
            watch = Watch(PATIENCE_SECONDS)
            while not _acquire(lock, LOOK_SECONDS):
                watch.see(partial.size)
                if watch.expired:
                    raise CheckpointError(
                        f"{target}: another process is fetching it, but for {PATIENCE_SECONDS:g} s it has brought "
                        "nothing. End that one; the same command goes on from there"
                    )
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _megabytes(count: int) -> str:
    return f"{count / _MEGABYTE:.1f} MB"
