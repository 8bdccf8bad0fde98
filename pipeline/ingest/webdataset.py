"""WebDataset tars of anyone's layout, and tars of nothing but sounds with a list beside them."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from pipeline.dataset.segments import read_segment_files
from pipeline.dataset.tar_index import TarMember
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import DecodeError
from pipeline.ingest.descriptions import clip_id_of
from pipeline.ingest.file_ranges import FileRanges
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle, Source, from_folder, versioned_files
from pipeline.ingest.tars import TarRules, read_clips, read_samples
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class WebdatasetSource(Source):
    """The clips of tars, in the tars' order; ids and labels by the rules of `pipeline index`, or labels from lists."""

    paths: tuple[str, ...]
    """Tars, or folders of them, local or URLs."""
    segments: tuple[str, ...] = ()
    """AudioSet's segment lists; without any, the json beside each sound has the labels."""
    keep_unlabelled: bool = False
    """Take clips whose json is missing or names no labels."""
    numbered: bool = False
    """Whether the user said which list the jsons' class numbers are of: the vocabulary."""
    working_folder: str = field(default_factory=os.getcwd)
    """What paths that aren't absolute are relative to."""

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the headers of all tars, and the jsons in them.

        Raises:
            ManifestError: a list is malformed.
            UsageError: a path is not there.
        """
        labeller = _ListLabeller(self.segments, vocabulary, notes) if self.segments else None
        rules = TarRules(
            vocabulary=vocabulary, checksums=False, keep_unlabelled=self.keep_unlabelled, numbered=self.numbered
        )
        for location, version in versioned_files(self.paths, (".tar", ".tgz", ".tar.gz"), "--tars"):
            with storage.open_input(from_folder(self.working_folder, location)) as stream:
                if labeller is not None:
                    yield from labeller.clips(stream, location, version)
                    continue
                clips, rejections = read_clips(stream, location, rules)
            yield from rejections
            for clip in clips:
                known = {**clip.facts, "label_mask": clip.label_mask, "unique_id": clip.unique_id}
                yield _planned(location, version, clip.audio, clip.clip_id, clip.labels, known)
        if labeller is not None:
            yield from labeller.missing()

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the tars, each with its first clip."""
        return _open_reader(self.working_folder)


class _ListLabeller:
    """Gives sounds without a json the labels and times that AudioSet's lists have for them."""

    def __init__(self, segments: Sequence[str], vocabulary: Vocabulary, notes: Counter[str]) -> None:
        self._segments = read_segment_files(segments, vocabulary).combine_chunks()
        self._row_of = {clip_id: row for row, clip_id in enumerate(self._segments["clip_id"].to_pylist())}
        self._is_found = bytearray(len(self._row_of))
        self._notes = notes

    def clips(self, stream: BinaryIO, location: str, version: str) -> Iterator[PlannedClip | Rejection]:
        """Yields the clips of one tar that a list has."""
        samples, rejections = read_samples(stream, location, checksums=False)
        yield from rejections
        for sample in samples:
            try:
                clip_id = clip_id_of(sample.description or {}, sample.key, self._row_of)
                if (row := self._row_of.get(clip_id)) is None:
                    self._notes["sounds in no list"] += 1
                    continue
                self._is_found[row] = True
                segment = self._segments.slice(row, 1).to_pylist()[0]
                audio = sample.checked_audio()
            except UnusableClipError as error:
                yield Rejection(None, f"{location}/{sample.key}", error.reason, error.detail)
                continue
            yield _planned(location, version, audio, clip_id, tuple(segment["labels"]), segment)

    def missing(self) -> Iterator[Rejection]:
        """Yields the listed clips that no tar has."""
        for clip_id, row in self._row_of.items():
            if not self._is_found[row]:
                yield Rejection(clip_id, None, "file missing")


def _planned(
    location: str, version: str, audio: TarMember, clip_id: str, labels: tuple[int, ...], known: Mapping[str, Any]
) -> PlannedClip:
    return PlannedClip(
        clip_id=clip_id,
        file=location,
        version=version,
        labels=labels,
        member=audio.name,
        position=audio.offset,
        size=audio.size,
        start_seconds=known.get("start_seconds"),
        end_seconds=known.get("end_seconds"),
        label_mask=known.get("label_mask"),
        unique_id=known.get("unique_id"),
    )


@contextmanager
def _open_reader(working_folder: str) -> Iterator[ClipReader]:
    ranges = FileRanges(working_folder)

    def read(clip: PlannedClip) -> bytes:
        size = clip.size or 0
        data = ranges.read(clip.file, clip.position, size)
        if len(data) < size:
            raise DecodeError("cut short", f"{clip.file} became shorter while it was read")
        return data

    def handles(clips: Sequence[PlannedClip]) -> Iterator[ReadHandle]:
        for clip in clips:
            yield partial(read, clip)

    yield handles
