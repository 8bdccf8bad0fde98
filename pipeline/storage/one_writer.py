"""A folder that is being written has one writer; a second one is told who that is.

On a disk a lock says so, which the kernel ends with its process. In an object store it is a lease: an object that only
one writer can put there, which its holder renews as long as it lives.
"""

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import PipelineError, StorageError, UsageError
from pipeline.interruption import interrupt_main
from pipeline.storage.files import WRITER_LOCK_NAME, WRITER_NAME, is_remote, join_path, local_path, remove
from pipeline.storage.remote import leases

_RENEW_SECONDS = 10.0
_ABANDONED_SECONDS = 60.0
"""A lease that nobody has renewed for so long may be taken over: its holder was killed, or is cut off."""
_LOOK_SECONDS = 2.0

_log = logging.getLogger(__name__)


@contextmanager
def one_writer(location: str | Path) -> Iterator[None]:
    """Be the only one of our processes that writes into a folder while the block runs.

    Web servers and `hf://` know no leases, and some file systems no locks: there nobody is kept out.

    Raises:
        UsageError: another process writes there.
        StorageError: nothing may be written there.
        PipelineError: somebody took this process for dead, such as after a long stop, and writes there now.
    """
    if not is_remote(location):
        with _locked(location):
            yield
    elif leases.are_known(str(location)):
        with _leased(str(location)):
            yield
    else:
        yield


@contextmanager
def _locked(location: str | Path) -> Iterator[None]:
    folder = local_path(location)
    made = not folder.exists()
    lock = FileLock(folder / WRITER_LOCK_NAME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # how filelock says that this file system has no locks
            lock.acquire(blocking=False)
    except Timeout as error:
        holder = b""
        with suppress(OSError):
            holder = (folder / WRITER_NAME).read_bytes()
        raise _refusal(location, _parsed(holder)) from error
    except OSError as error:
        raise StorageError(f"{location}: can't be written ({error.strerror or error})") from error
    try:
        with suppress(OSError):  # no room; then a second writer is not told who it is
            (folder / WRITER_NAME).write_text(json.dumps(_about_this_process()), encoding="utf-8")
        yield
    finally:
        (folder / WRITER_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # before it is released: who waits sees that the file is gone, and makes it again
            (folder / WRITER_LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()


@contextmanager
def _leased(location: str) -> Iterator[None]:
    lease = _Lease(location)
    lease.acquire()
    try:
        yield
    except BaseException as error:
        if lease.taken_by is not None:
            raise lease.loss() from error
        raise
    finally:
        lease.end()
    if lease.taken_by is not None:
        raise lease.loss()


class _Lease:
    """The right to write into a folder of an object store, renewed by a thread.

    Nobody's clock is asked: who wants to take a lease over watches for long enough whether it changes.
    """

    def __init__(self, location: str) -> None:
        self._location, self._object = location, join_path(location, WRITER_NAME)
        self._about = {**_about_this_process(), "run": secrets.token_hex(8)}
        self._renewals = 0
        self._ended = threading.Event()
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.taken_by: dict[str, Any] | None = None
        """Who writes there now, where that is somebody else."""

    def acquire(self) -> None:
        version = None
        while not leases.put_if(self._object, self._content(), version):
            holder, version = self._read()
            if version is None or holder.get("run") == self._about["run"]:  # the latter: an answer got lost
                continue
            if not self._is_abandoned(holder, version):
                raise _refusal(self._location, holder)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(_RENEW_SECONDS)
        with suppress(PipelineError):  # nobody renews it any more
            if self._read()[0].get("run") == self._about["run"]:
                remove(self._object)

    def loss(self) -> PipelineError:
        return PipelineError(
            f"{self._location}: this run was taken for dead, and {_in_words(self.taken_by or {})} writes there now. "
            "Let that end; then the same command does what is missing"
        )

    def _keep(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            with suppress(PipelineError):  # the server is away, for others too; the next look tells
                self._renew()
            if self.taken_by is not None:
                if self._interrupts:
                    interrupt_main()
                return

    def _renew(self) -> None:
        holder, version = self._read()
        if version is not None and holder.get("run") != self._about["run"]:
            self.taken_by = holder
            return
        self._renewals += 1
        leases.put_if(self._object, self._content(), version)

    def _read(self) -> tuple[dict[str, Any], leases.Version | None]:
        content, version = leases.read(self._object)
        return _parsed(content), version

    def _content(self) -> bytes:
        # A version is known by its content, so each has another.
        return json.dumps({**self._about, "renewals": self._renewals}).encode()

    def _is_abandoned(self, holder: dict[str, Any], version: leases.Version) -> bool:
        if holder.get("machine") == self._about["machine"] and not _is_running(holder.get("process")):
            return True
        _log.info(
            "%s: %s wrote there; looking, for up to %g s, whether it still does",
            self._location,
            _in_words(holder),
            _ABANDONED_SECONDS,
        )
        end = time.monotonic() + _ABANDONED_SECONDS
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            now = self._read()[1]
            if now != version:
                return now is None
        return True


def _refusal(location: str | Path, holder: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{location}: is being written by {_in_words(holder)}. Wait until it ends, end it, or choose another folder"
    )


def _about_this_process() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().isoformat(" ", "seconds"),
        "machine": _machine(),
    }


def _machine() -> str:
    """Returns what only processes have in common that see each other's numbers; empty where nobody can say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"unknown {secrets.token_hex(8)}"


def _is_running(process: object) -> bool:
    try:
        os.kill(int(str(process)), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def _parsed(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        about = json.loads(content)
        if isinstance(about, dict):
            return about
    return {}


def _in_words(holder: dict[str, Any]) -> str:
    try:
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except KeyError:
        return "another process"
