"""AudioSet's segment lists and a folder of audio files → which file is which clip."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.clip_ids import clip_id_of_stem
from pipeline.dataset.segments import read_segment_files
from pipeline.dataset.shards import DOWNLOADED_FORMATS, UNREADABLE_FORMATS
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.ingest.audio_files import AudioFile, file_version, find_audio_files, open_file_reader
from pipeline.ingest.rejections import Rejection, escaped
from pipeline.ingest.sources import ClipReader, PlannedClip, Source


@dataclass(frozen=True, slots=True)
class AudiosetSource(Source):
    """The clips of segment lists that have a file, in the order of the lists.

    Where several files claim one clip, a path that can be written down comes first, then a format that can be decoded,
    of these one that no downloader writes, then the name that is the id itself, then the path that comes first in the
    alphabet.
    """

    segments: tuple[str, ...]
    audio: Path

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the lists.

        Raises:
            ManifestError: a list is malformed, or none of its clips has a file.
        """
        segments = read_segment_files(self.segments, vocabulary)
        match = _match(segments["clip_id"], find_audio_files(self.audio), notes)
        if not any(match.chosen):
            raise ManifestError(
                f"none of the {len(segments)} listed clips has a file in {self.audio}; is it the right folder?"
            )
        row = 0
        for batch in segments.to_batches(1 << 14):
            for segment in batch.to_pylist():
                yield from self._items(segment, match, row)
                row += 1

    def _items(self, segment: dict, match: "_Match", row: int) -> Iterator[PlannedClip | Rejection]:
        clip_id, path = segment["clip_id"], match.chosen[row]
        if path is None:
            yield Rejection(clip_id, None, "file missing")
            return
        for other in sorted(match.others.get(row, ())):
            yield Rejection(clip_id, other, "duplicate file", f"{path} was taken")
        yield PlannedClip(
            clip_id=clip_id,
            file=path,
            version=file_version(self.audio / path),
            labels=tuple(segment["labels"]),
            start_seconds=segment["start_seconds"],
            end_seconds=segment["end_seconds"],
        )

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the folder."""
        return open_file_reader(self.audio)


@dataclass(slots=True)
class _Match:
    """The lists' clips and the folder's files, brought together; paths alone, of which there may be millions."""

    chosen: list[str | None]
    """Row of the lists → its file."""
    others: dict[int, list[str]]
    """Row → the files that another file of the same clip was preferred to."""


def _match(clip_ids: pa.ChunkedArray, files: Iterable[AudioFile], notes: Counter[str]) -> _Match:
    row_of = {clip_id: row for row, clip_id in enumerate(clip_ids.to_pylist())}
    match = _Match([None] * len(row_of), {})
    for file in files:
        clip_id = clip_id_of_stem(file.stem, row_of)
        if (row := row_of.get(clip_id)) is None:
            notes["files in no list"] += 1
            continue
        taken, path = match.chosen[row], file.path
        if taken is not None:
            if _preference(AudioFile(taken), clip_id) <= _preference(file, clip_id):
                taken, path = path, taken
            match.others.setdefault(row, []).append(taken)
        match.chosen[row] = path
    return match


def _preference(file: AudioFile, clip_id: str) -> tuple[bool, bool, bool, bool, str]:
    is_unusable, extension = escaped(file.path) != file.path, file.extension
    is_readable = extension not in UNREADABLE_FORMATS
    return is_unusable, not is_readable, extension in DOWNLOADED_FORMATS, file.stem != clip_id, file.path
