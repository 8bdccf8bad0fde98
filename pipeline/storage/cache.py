"""One local folder for what can be made or fetched again, within one limit: the least recently used goes first.

It holds aligned logits (`logits-*`), decoded audio (`waveforms-*`) and what was read of remote shards (`shard-*`). Any
number of processes share it. A file that a living process relies on is locked by it, in a way that ends with the
process, and is never removed. Files of other names are left alone.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.redaction import redact

GIGABYTE = 1_000_000_000

_KINDS = ("logits-", "waveforms-", "shard-")
_STAGED = ".staged-"
_GRACE_SECONDS = 60
"""What was used within this time stays: somebody may be about to lock it."""
_ABANDONED_SECONDS = 86_400
"""Age of a half-written file whose writer is taken for dead."""
_LARGEST_STEP_BYTES = 64_000_000
"""So much a process may write between two looks at the whole folder; a sixteenth of the limit where that is less."""
_PAUSE_SECONDS = 10
"""Time between two looks at a folder that is full of what is in use."""

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
        self._locks: list[int] = []

    def hold(self, path: Path) -> bool:
        """Keep a file of the folder from being removed for as long as this process and its children live.

        Returns:
            Whether it is there; False where it was removed in the meantime.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_at(path, descriptor):
            os.close(descriptor)
            return False
        self._locks.append(descriptor)
        os.utime(path)
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

    def make_room(self, size: int = 0) -> int:
        """Remove what was not used for longest until `size` more bytes fit; give how many more fit now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".prune.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            groups = self._groups()
            used = sum(group.bytes for group in groups)
            for group in sorted(groups, key=lambda group: group.used_at):
                if used + size <= self.max_bytes:
                    break
                if group.remove():
                    used -= group.bytes
            return max(0, self.max_bytes - used)
        finally:
            os.close(lock)

    def _groups(self) -> list["_Group"]:
        """Gather the files that belong together: those with the same name up to the first dot."""
        groups: dict[str, _Group] = defaultdict(_Group)
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                if entry.name.startswith(".") and _STAGED in entry.name:
                    if time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                        os.unlink(entry.path)
                elif entry.name.startswith(_KINDS) and entry.is_file(follow_symlinks=False):
                    groups[entry.name.partition(".")[0]].add(Path(entry.path), stat)
        return list(groups.values())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_locks": []}


class _Group:
    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.bytes = 0
        self.used_at = 0.0

    def add(self, path: Path, stat: os.stat_result) -> None:
        self.paths.append(path)
        self.bytes += stat.st_blocks * 512  # decoded audio and shards have holes
        self.used_at = max(self.used_at, stat.st_mtime)

    def remove(self) -> bool:
        """Remove the files unless somebody holds one of them."""
        # Whoever reads from a mirrored shard has it open for that moment only, and finds the bytes all the same.
        if not self.paths[0].name.startswith("shard-") and time.time() - self.used_at < _GRACE_SECONDS:
            return False
        descriptors: list[int] = []
        try:
            for path in self.paths:
                descriptors.append(os.open(path, os.O_RDONLY))
                fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.paths:
                path.unlink()
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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
            descriptor = os.open(self._path(name), os.O_RDONLY)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, size, offset)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def write(self, name: str, offset: int, content: bytes) -> None:
        """Keep bytes, unless the cache is full of what is in use; a full disk is no reason to fail."""
        path = self._path(name)
        try:
            if not self._cache.admit(len(content)):
                return
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, content, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.warning("%s: what was fetched could not be kept (%s)", path, error)

    def touch(self, name: str) -> None:
        """Note that a shard was used just now."""
        with suppress(OSError):
            os.utime(self._path(name))
