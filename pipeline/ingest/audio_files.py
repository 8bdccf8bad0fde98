"""Audio files in a local folder: found by their extensions, read one by one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.dataset.manifest import MAX_CLIP_BYTES
from pipeline.dataset.shards import AUDIO_FORMATS, UNREADABLE_FORMATS
from pipeline.errors import DecodeError
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle


@dataclass(frozen=True, slots=True)
class AudioFile:
    """One audio file of a folder."""

    path: str
    """Relative to the folder, with `/`."""

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return self.path.rpartition("/")[2].rpartition(".")[0]

    @property
    def extension(self) -> str:
        """Lower case, without the dot."""
        return self.path.rpartition(".")[2].lower()


def find_audio_files(folder: Path) -> Iterator[AudioFile]:
    """Yields the audio files below `folder`, by their extensions; links are followed, but no folder is walked twice.

    Folders and names come in the order of their characters' codes.
    """
    visited: set[tuple[int, int]] = set()
    _is_new(str(folder), visited)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new(os.path.join(parent, name), visited)]
        for name in sorted(names):
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in AUDIO_FORMATS | UNREADABLE_FORMATS:
                yield AudioFile(Path(parent, name).relative_to(folder).as_posix())


def file_version(path: Path) -> str:
    """Returns what changes when a file does: size and modification time."""
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_size} {stat.st_mtime_ns}"


@contextmanager
def open_file_reader(folder: Path) -> Iterator[ClipReader]:
    """Read clips that are files below `folder`; their handles may be called in any order."""

    def handles(clips: Sequence[PlannedClip]) -> Iterator[ReadHandle]:
        for clip in clips:
            yield partial(_read_file, folder / clip.file)

    yield handles


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise DecodeError("no such file", "a dangling link, or no ordinary file")
        if path.stat().st_size > MAX_CLIP_BYTES:
            raise DecodeError("too long", f"{path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DecodeError("unreadable file", error.strerror or str(error)) from error


def _is_new(folder: str, visited: set[tuple[int, int]]) -> bool:
    """Returns whether `folder` was not walked yet; links can make a circle."""
    stat = os.stat(folder)
    key = stat.st_dev, stat.st_ino
    is_new = key not in visited
    visited.add(key)
    return is_new
