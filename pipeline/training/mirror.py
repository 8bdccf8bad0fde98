"""A run on an object store: it works in a local folder, whose files are copied there as they change."""

import logging
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import StorageUnavailableError, UsageError
from pipeline.storage import files as storage

_log = logging.getLogger(__name__)


class RunMirror:
    """A local folder for a run, and the URL that holds all it is worth.

    What the URL holds is fetched first, so that a run goes on from there on any machine. The folder goes with the
    process.

    Args:
        location: the run's URL.
        resume: whether there may be something already.

    Raises:
        UsageError: there is, though `resume` is off.
        StorageError: it can't be read, or is behind a web server.
    """

    def __init__(self, location: str, *, resume: bool) -> None:
        storage.check_writable(location)
        names = storage.list_tree(location)
        if names and not resume:
            raise UsageError(
                f"--run {location}: is not empty. Add --resume to go on with what it holds, or choose another folder"
            )
        self._location = location
        self._temporary: tempfile.TemporaryDirectory[str] | None = tempfile.TemporaryDirectory(prefix="run-")
        self.path = Path(self._temporary.name)
        """The local folder."""
        self._published: dict[str, tuple[int, int]] = {}
        for name in names:
            self._fetch(name)
        self._published = self._present()

    def _fetch(self, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.local_copy(storage.join_path(self._location, name)) as copied:
            shutil.move(copied, target)

    def publish(self) -> None:
        """Put every file that is new or has changed to the URL, each whole, and remove those that are gone.

        New files come before old ones go, so that whatever happens in between, a resume finds a checkpoint. A server
        that can't be reached just now is no reason to stop training: the next call catches up.
        """
        if self._temporary is None:
            return
        present = self._present()
        try:
            for name in sorted(present, key=_checkpoints_first):
                if self._published.get(name) != present[name]:
                    with storage.publish(storage.join_path(self._location, name)) as staged:
                        shutil.copyfile(self.path / name, staged)
                    self._published[name] = present[name]
            for name in self._published.keys() - present.keys():
                storage.remove(storage.join_path(self._location, name))
                del self._published[name]
        except StorageUnavailableError as error:
            _log.warning("the run could not be copied, it goes on: %s", error)

    def close(self) -> None:
        """Publish what is left, and remove the local folder.

        Raises:
            StorageError: not all of it could be copied; the folder stays, and the message names it.
        """
        if self._temporary is None:
            return
        self.publish()
        if missing := sorted(name for name, mark in self._present().items() if self._published.get(name) != mark):
            kept = Path(tempfile.mkdtemp(prefix="run-kept-")) / "run"
            shutil.copytree(self.path, kept)
            self._temporary.cleanup()
            raise StorageUnavailableError(
                f"{self._location}: {len(missing)} files of the run could not be copied, such as {missing[0]}. All of "
                f"it is in {kept}: copy it there, or go on with --run {kept} --resume"
            )
        self._temporary.cleanup()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_temporary": None}  # the process that made the folder is the one that copies it

    def _present(self) -> dict[str, tuple[int, int]]:
        """File → (size, time of its last change)."""
        stats = {
            path.relative_to(self.path).as_posix(): path.stat()
            for path in self.path.rglob("*")
            if path.is_file() and not storage.is_staged(path.name)
        }
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _checkpoints_first(name: str) -> tuple[bool, str]:
    return not name.startswith("checkpoints/"), name
