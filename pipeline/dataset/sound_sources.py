"""Files, folders, patterns, datasets and URLs → the sounds that are meant, each with a name, opened one by one."""

import fnmatch
import glob
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.dataset.clip_table import ClipTable
from pipeline.dataset.shards import AUDIO_FORMATS, UNREADABLE_FORMATS, read_clip_bytes
from pipeline.dataset.sound_parts import open_encoded
from pipeline.errors import PipelineError
from pipeline.redaction import redact
from pipeline.storage import files as storage

_MANIFEST = "manifest.parquet"


@dataclass(frozen=True, slots=True)
class SoundFiles:
    """Some files, paths or URLs."""

    locations: Sequence[str]

    def __len__(self) -> int:
        return len(self.locations)

    def name(self, number: int) -> str:
        """Returns what outputs call a sound."""
        return redact(self.locations[number])

    @contextmanager
    def open(self, number: int) -> Iterator[bytes]:
        """Yields a sound's encoded bytes.

        Raises:
            PipelineError: it can't be read.
        """
        with open_encoded(self.locations[number]) as data:
            yield data


class DatasetSounds:
    """The clips of a dataset; outputs call them by their ids."""

    def __init__(self, clips: ClipTable) -> None:
        self._clips = clips
        self._files = storage.RangeReader(clips.location)

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, number: int) -> str:
        """Returns the clip's id."""
        return self._clips.clip_id(number)

    @contextmanager
    def open(self, number: int) -> Iterator[bytes]:
        """Yields a clip's encoded bytes.

        Raises:
            PipelineError: they can't be read, or are not those that the manifest was made from.
        """
        yield read_clip_bytes(self._files, self._clips, number)


class Sounds:
    """All the sounds that were named, in that order; it can be sent to another process."""

    def __init__(self, groups: Sequence[SoundFiles | DatasetSounds]) -> None:
        self._groups = groups
        self._ends = list(itertools.accumulate(map(len, groups)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, number: int) -> str:
        """Returns what outputs call a sound."""
        group, place = self._find(number)
        return group.name(place)

    @contextmanager
    def open(self, number: int) -> Iterator[bytes]:
        """Yields a sound's encoded bytes.

        Raises:
            PipelineError: they can't be read.
        """
        group, place = self._find(number)
        with group.open(place) as data:
            yield data

    @property
    def encoded_bytes(self) -> int:
        """How large the local files are, together; 0 for what lies elsewhere."""
        files = [path for group in self._groups if isinstance(group, SoundFiles) for path in group.locations]
        local = [storage.local_path(path) for path in files if not storage.is_remote(path)]
        return sum(path.stat().st_size for path in local if path.is_file())

    def _find(self, number: int) -> tuple[SoundFiles | DatasetSounds, int]:
        place = bisect_right(self._ends, number)
        return self._groups[place], number - (self._ends[place - 1] if place else 0)


def find_sounds(locations: Sequence[str]) -> Sounds:
    """Find the sounds that some locations mean.

    Args:
        locations: files; folders, with all files below them that are called as sounds are; patterns with `*`, `?` and
            `[…]`, where `**` is any number of folders; dataset folders. Each a path or a URL.

    Raises:
        PipelineError: there is no such file, or a folder or pattern holds no sound.
    """
    return Sounds([_find_at(location) for location in locations])


def _find_at(location: str) -> SoundFiles | DatasetSounds:
    if storage.is_remote(location):
        is_file = "." in storage.file_name(location) and not any(mark in location for mark in "*[")
        if is_file and not location.endswith("/"):
            return SoundFiles([location])
    else:
        path = storage.local_path(location)
        if not path.exists():
            return SoundFiles(_matches(location))
        if not path.is_dir():
            return SoundFiles([location])
    if _has_pattern(location):
        return SoundFiles(_matches(location))
    if storage.exists(storage.join_path(location, _MANIFEST)):
        from pipeline.dataset.manifest import read_manifest  # imports Arrow, which whoever tags files need not wait for

        return DatasetSounds(read_manifest(location).clips)
    found = [storage.join_path(location, name) for name in storage.list_tree(location) if _is_sound(name)]
    if not found:
        raise PipelineError(f"{location}: no sounds below this folder, and it is no dataset (no {_MANIFEST})")
    return SoundFiles(found)


def _has_pattern(location: str) -> bool:
    return storage.is_remote(location) and any(mark in location for mark in "*[")


def _matches(pattern: str) -> list[str]:
    """Returns the files that a pattern fits, sorted; those of unfit names only if the pattern says their extension."""
    if not any(mark in pattern for mark in "*?["):
        raise PipelineError(f"{pattern}: no such file")
    if storage.is_remote(pattern):
        root = pattern[: min(pattern.index(mark) for mark in "*[" if mark in pattern)].rpartition("/")[0]
        names = [storage.join_path(root, name) for name in storage.list_tree(root)]
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        paths = glob.glob(str(storage.local_path(pattern)), recursive=True)
        found = sorted(path for path in paths if storage.local_path(path).is_file())
    sounds = [name for name in found if _is_sound(name)] if pattern.endswith("*") else found
    if not sounds:
        raise PipelineError(f"{pattern}: no sound fits this pattern")
    return sounds


def _is_sound(name: str) -> bool:
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem.strip(".")) and extension.lower() in AUDIO_FORMATS | UNREADABLE_FORMATS
