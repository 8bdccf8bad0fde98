"""One local folder for what can be made or fetched again, within one limit: the least recently used goes first.

It holds aligned logits (`logits-*`), decoded audio (`waveforms-*`) and what was read of remote shards (`shard-*`). Any
number of processes share it. What a living process relies on is never removed: a lock file beside it, which the process
holds and which ends with it, says so. Files of other names are left alone.
"""

import hashlib
import logging
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import StorageError, UsageError
from pipeline.redaction import redact
from pipeline.storage.descriptors import opened, read_at, write_at

GIGABYTE = 1_000_000_000

_KINDS = ("logits-", "waveforms-", "shard-")
_STAGED = ".staged-"
_IN_USE = ".in-use-"
_GRACE_SECONDS = 60
"""What was used within this time stays: somebody may be about to lock it."""
_ABANDONED_SECONDS = 86_400
"""Age of a half-written file whose writer is taken for dead."""
_LARGEST_STEP_BYTES = 64_000_000
"""So much a process may write between two looks at the whole folder; a sixteenth of the limit where that is less."""
_LOCK_SECONDS = 300.0
"""How long another process may take to look through the folder, which is a matter of a second."""
_PAUSE_SECONDS = 10
"""Time between two looks at a folder that is full of what is in use."""

_HELD: list[FileLock] = []
"""By this process, until it ends."""

_log = logging.getLogger(__name__)


class CacheFolder:
    """The folder and its limit.

    Args:
        folder: a local folder; it may be cleared when no run uses it.
        max_bytes: what it may take on the disk, give or take what one process writes between two looks, 64 MB at most.

    Raises:
        UsageError: the limit is not above 0.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        if not max_bytes > 0:
            raise UsageError(f"cache_size is {max_bytes / GIGABYTE:g} GB; choose a value above 0")
        self.folder = folder
        self.max_bytes = int(max_bytes)
        self._step = max(1, min(_LARGEST_STEP_BYTES, self.max_bytes // 16))
        self._allowed = 0
        self._next_look = 0.0

    def hold(self, path: Path) -> bool:
        """Keep a file of the folder, and those that belong to it, from being removed for as long as this process lives.

        Returns:
            Whether it is there; False where it was removed in the meantime.
        """
        with self._alone():
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
            # Each holder has a lock of its own; on the file itself, Windows would let nobody else read.
            lock = FileLock(self.folder / f".{_group_of(path.name)}{_IN_USE}{secrets.token_hex(8)}")
            lock.acquire()
        _HELD.append(lock)
        return True

    def admit(self, size: int) -> bool:
        """Ask for room for `size` more bytes, before they are written; removes what was not used for long."""
        if self._allowed < size:
            if time.monotonic() < self._next_look:
                return False
            room = self.make_room(max(size, self._step))
            self._allowed = min(room, max(size, self._step))
            if self._allowed < size:
                self._next_look = time.monotonic() + _PAUSE_SECONDS
                return False
        self._allowed -= size
        return True

    def make(self) -> None:
        """Make the folder where it is not there yet.

        Raises:
            StorageError: that is not allowed, as in a home folder that can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: can't be made for what is kept ({error.strerror}). Choose another --cache-dir"
            ) from error

    def make_room(self, size: int = 0) -> int:
        """Remove what was not used for longest until `size` more bytes fit; give how many more fit now."""
        with self._alone():
            groups = self._groups()
            used = sum(group.bytes for group in groups)
            for group in sorted(groups, key=lambda group: group.used_at):
                if used + size <= self.max_bytes:
                    break
                if group.remove():
                    used -= group.bytes
            return max(0, self.max_bytes - used)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only process that removes files, or keeps them from being removed.

        Raises:
            StorageError: another one, which must have been stopped, has been at it for too long.
        """
        self.make()
        lock = FileLock(self.folder / ".prune.lock", timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise StorageError(
                f"{self.folder}: another process has been clearing it for {_LOCK_SECONDS:g} s. End that one, or choose "
                "another --cache-dir"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _groups(self) -> list["_Group"]:
        """Gather the files that belong together: those with the same name up to the first dot."""
        groups: dict[str, _Group] = defaultdict(_Group)
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                if entry.name.startswith(".") and _STAGED in entry.name:
                    if time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                        os.unlink(entry.path)
                elif entry.name.startswith(".") and _IN_USE in entry.name:
                    groups[_group_of(entry.name[1:])].in_use |= not _remove_if_free(Path(entry.path))
                elif entry.name.startswith(_KINDS) and entry.is_file(follow_symlinks=False):
                    groups[_group_of(entry.name)].add(Path(entry.path), stat)
        return [group for group in groups.values() if group.paths]


def _group_of(name: str) -> str:
    return name.partition(".")[0]


class _Group:
    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.in_use = False
        self.bytes = 0
        self.used_at = 0.0

    def add(self, path: Path, stat: os.stat_result) -> None:
        self.paths.append(path)
        self.bytes += bytes_on_disk(stat)
        self.used_at = max(self.used_at, stat.st_mtime)

    def remove(self) -> bool:
        """Remove the files unless somebody holds one of them."""
        # Whoever reads from a mirrored shard has it open for that moment only, and finds the bytes all the same.
        age = time.time() - self.used_at  # below 0 where the clock was set back
        fresh = not self.paths[0].name.startswith("shard-") and 0 <= age < _GRACE_SECONDS
        if self.in_use or fresh:
            return False
        try:
            for path in self.paths:
                path.unlink(missing_ok=True)
        except PermissionError:  # Windows removes no file that somebody has open
            return False
        return True


def _remove_if_free(lock: Path) -> bool:
    """Remove the lock file of a process that has ended; returns whether it has."""
    try:
        FileLock(lock).acquire(blocking=False).lock.release()
    except Timeout:
        return False
    lock.unlink(missing_ok=True)
    return True


def bytes_on_disk(stat: os.stat_result) -> int:
    """Returns what a file takes, which is less than its size where it has holes, as far as the system tells."""
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


class ShardMirror:
    """What was read of a remote folder's shards, at the same places in local files with holes.

    Nobody notes what is there: bytes count when they have the checksum that the caller knows, and a hole has not.

    Args:
        cache: where the files are, and the limit.
        location: of the remote folder.
    """

    def __init__(self, cache: CacheFolder, location: str) -> None:
        self._cache = cache
        self._location = redact(location)

    def _path(self, name: str) -> Path:
        key = hashlib.sha256(f"{self._location}\n{name}".encode()).hexdigest()
        return self._cache.folder / f"shard-{key[:32]}.tar"

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Returns what lies there, be it right or not; fewer bytes where the file ends before."""
        try:
            with opened(self._path(name), os.O_RDONLY) as descriptor:
                return read_at(descriptor, size, offset)
        except OSError:
            return b""

    def write(self, name: str, offset: int, content: bytes) -> None:
        """Keep bytes, unless the cache is full of what is in use; a full disk is no reason to fail."""
        path = self._path(name)
        try:
            if not self._cache.admit(len(content)):
                return
            with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
                write_at(descriptor, content, offset)
        except (OSError, StorageError) as error:
            _log.warning("%s: what was fetched could not be kept (%s)", path, error)

    def touch(self, name: str) -> None:
        """Note that a shard was used just now."""
        with suppress(OSError):
            os.utime(self._path(name))
