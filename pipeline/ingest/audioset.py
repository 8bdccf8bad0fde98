"""AudioSet's segment lists and a folder of audio files → which file is which clip."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.clip_ids import clip_id_of_stem
from pipeline.errors import DecodeError
from pipeline.ingest.packing import PlannedClip
from pipeline.ingest.rejections import Rejection
from pipeline.manifest import MOST_CLIP_BYTES
from pipeline.segments import Segment
from pipeline.shards import AUDIO_FORMATS, UNREADABLE_FORMATS


@dataclass(frozen=True, slots=True)
class AudioFile:
    """One audio file of a folder."""

    path: str
    """Relative to the folder, with `/`."""
    stem: str
    """The name without its extension."""
    extension: str
    """Lower case, without the dot."""
    version: str
    """Size and modification time."""


@dataclass(frozen=True, slots=True)
class Match:
    """The lists' clips and the folder's files, brought together."""

    clips: list[PlannedClip]
    """The clips that have a file, in the order of the lists."""
    rejections: list[Rejection]
    """Clips without a file, and files that another file of the same clip was preferred to."""
    unlisted_files: int
    """Audio files that are no clip of the lists."""


def match_files(segments: Sequence[Segment], files: Iterable[AudioFile]) -> Match:
    """Find each segment's file.

    Where several files claim one clip, a format that can be decoded comes first, then the name that is the id itself,
    then the path that comes first in the alphabet.
    """
    listed = {segment.clip_id for segment in segments}
    claims: dict[str, list[AudioFile]] = {}
    unlisted_files = 0
    for file in files:
        clip_id = clip_id_of_stem(file.stem, listed)
        if clip_id in listed:
            claims.setdefault(clip_id, []).append(file)
        else:
            unlisted_files += 1
    clips: list[PlannedClip] = []
    rejections: list[Rejection] = []
    for segment in segments:
        if segment.clip_id not in claims:
            rejections.append(Rejection(segment.clip_id, None, "file missing"))
            continue
        first, *others = sorted(claims[segment.clip_id], key=lambda file: _preference(file, segment.clip_id))
        rejections += [
            Rejection(segment.clip_id, file.path, "duplicate file", f"{first.path} was taken") for file in others
        ]
        clips.append(
            PlannedClip(
                segment.clip_id, first.path, first.version, segment.labels, segment.start_seconds, segment.end_seconds
            )
        )
    return Match(clips, rejections, unlisted_files)


def find_audio_files(folder: Path) -> Iterator[AudioFile]:
    """Give the audio files below `folder`, by their extensions; links are followed, but no folder is walked twice."""
    visited: set[tuple[int, int]] = set()
    _is_new(str(folder), visited)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new(os.path.join(parent, name), visited)]
        for name in names:
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in AUDIO_FORMATS | UNREADABLE_FORMATS:
                path = os.path.join(parent, name)
                yield AudioFile(os.path.relpath(path, folder), stem, extension.lower(), _version(path))


def read_audio_file(folder: Path, clip: PlannedClip) -> bytes:
    """Read the bytes of a clip that `match_files` found.

    Raises:
        DecodeError: there is no ordinary file, or it is too large.
    """
    path = folder / clip.path
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise DecodeError("no such file", "a dangling link, or no ordinary file")
        if path.stat().st_size > MOST_CLIP_BYTES:
            raise DecodeError("too long", f"{path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DecodeError("unreadable file", error.strerror or str(error)) from error


def _preference(file: AudioFile, clip_id: str) -> tuple[bool, bool, str]:
    return file.extension in UNREADABLE_FORMATS, file.stem != clip_id, file.path


def _is_new(folder: str, visited: set[tuple[int, int]]) -> bool:
    """Tell whether `folder` was not walked yet; links can make a circle."""
    stat = os.stat(folder)
    key = stat.st_dev, stat.st_ino
    is_new = key not in visited
    visited.add(key)
    return is_new


def _version(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return "absent"
    return f"{stat.st_size} {stat.st_mtime_ns}"
