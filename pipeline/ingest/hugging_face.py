"""Parquet files as the Hugging Face Hub keeps sounds: agkphysics/AudioSet and what is made like it."""

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.clip_ids import clip_id_of_path, is_youtube_id, without_extension
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary
from pipeline.errors import DecodeError, ManifestError, UsageError
from pipeline.ingest.descriptions import (
    ID_FIELDS,
    LABEL_FIELDS,
    label_fields,
    labels_of,
    look_at_labels,
    stated_id,
    usable_clip_id,
)
from pipeline.ingest.file_marks import file_mark
from pipeline.ingest.labels import LabelField
from pipeline.ingest.own_classes import vocabulary_in_order
from pipeline.ingest.rejections import NOT_UTF8, Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle, Source, from_folder, versioned_files
from pipeline.storage import files as storage

_SCANNED_AT_ONCE = 1 << 14
_SOUNDS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HuggingFaceSource(Source):
    """Rows of `video_id`, `audio` (a struct of bytes and path), `labels` (mids) and `human_labels` (names).

    Other spellings of id and labels are those of `descriptions`. A row without an id gets one of its file and its
    sound's name, or its number: the Hub keeps no more of a path than the name at its end, which other files and rows
    have, too. Of a file's sounds no more is in memory than a page of the column, which the Hub's writer cuts at 100
    rows.
    """

    paths: tuple[str, ...]
    """Parquet files, or folders of them, local or URLs."""
    id_column: str | None = None
    """The column of ids; None is whichever of the usual ones is there."""
    numbered: bool = False
    """Whether the user said which list class numbers are of: the vocabulary. A column's own names come before it."""
    working_folder: str = field(default_factory=os.getcwd)
    """What paths that aren't absolute are relative to."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the classes that the files name, in the order of their numbers, or AudioSet's where they name none.

        Raises:
            ManifestError: a file is no Parquet, or has no column of sounds.
            UsageError: a path is not there.
        """
        named: dict[str, None] = {}
        for location, _ in self._files():
            with storage.open_input(from_folder(self.working_folder, location)) as stream:
                for names in _class_names(_parquet_file(stream, location).schema_arrow).values():
                    named |= dict.fromkeys(names)
        audioset = audioset_vocabulary()
        if not named or named.keys() in (audioset.index_by_mid.keys(), audioset.index_by_name.keys()):
            return audioset
        return vocabulary_in_order(named, " ".join(self.paths))

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through all columns but the sounds.

        Raises:
            ManifestError: a file is no Parquet, or has no column of sounds.
            UsageError: a path is not there, or a file has class numbers and nobody says of which list.
        """
        for location, version in self._files():
            with storage.open_input(from_folder(self.working_folder, location)) as stream:
                file, mark = _parquet_file(stream, location), file_mark(stream, location)
                fields = self._label_fields(file, location, vocabulary)
                wanted = (*self._id_columns(file, location), *LABEL_FIELDS)
                columns = [name for name in wanted if name in file.schema_arrow.names]
                batches = file.iter_batches(_SCANNED_AT_ONCE, columns=[*columns, "audio.path"])
                for position, row in enumerate(row for batch in batches for row in _rows(batch)):
                    number = f"row {position}"
                    path = ((row or {}).get("audio") or {}).get("path") or number
                    try:
                        if row is None:
                            raise UnusableClipError(NOT_UTF8)
                        labels, own_id = labels_of(row, fields), self._id_of(row, path)
                        clip_id = usable_clip_id(own_id or f"{mark}/{clip_id_of_path(without_extension(path))}")
                    except UnusableClipError as error:
                        yield Rejection(None, f"{location}/{path}", error.reason, error.detail)
                        continue
                    yield PlannedClip(
                        clip_id=clip_id,
                        file=location,
                        version=version,
                        labels=labels,
                        member=path,
                        position=position,
                        unique_id=None if own_id else f"{mark}/{number}",
                    )

    def _files(self) -> list[tuple[str, str]]:
        return versioned_files(self.paths, (".parquet",), "--parquet")

    def _id_columns(self, file: pq.ParquetFile, location: str) -> tuple[str, ...]:
        names = file.schema_arrow.names
        if self.id_column is not None and self.id_column not in names:
            raise UsageError(f"{location}: has no column {self.id_column}; it has {', '.join(names)}")
        return ID_FIELDS if self.id_column is None else (self.id_column,)

    def _label_fields(self, file: pq.ParquetFile, location: str, vocabulary: Vocabulary) -> dict[str, LabelField]:
        schema = file.schema_arrow
        fields = label_fields(vocabulary, numbered=self.numbered, names=_class_names(schema))
        numbers = [name for name in fields if name in schema.names and _holds_numbers(schema.field(name).type)]
        for batch in file.iter_batches(_SCANNED_AT_ONCE, columns=numbers) if numbers else ():
            for row in batch.to_pylist():
                look_at_labels(row, fields)
        there = [name for name in fields if name in schema.names]
        if there and all(fields[name].lacks_list for name in there):
            raise UsageError(
                f"{location}: its column {there[0]} holds class numbers, and the file does not say which classes they "
                "stand for. Name their class list by --classes"
            )
        return fields

    def _id_of(self, row: dict[str, Any], path: str) -> str:
        """Returns the id that a row states, or that its file's name is; empty where there is none."""
        if self.id_column is not None:
            value = row[self.id_column]
            return "" if value is None else str(value)
        name = clip_id_of_path(without_extension(path))
        return stated_id(row) or (name if is_youtube_id(name) else "")

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the files, one after the other."""
        return _open_reader(self.working_folder)


@contextmanager
def _open_reader(working_folder: str) -> Iterator[ClipReader]:
    with ExitStack() as stack:
        cursor = _Cursor(working_folder, stack)

        def handles(clips: Sequence[PlannedClip]) -> Iterator[ReadHandle]:
            for clip in clips:
                yield partial(_sound_or_fault, cursor.read(clip))

        yield handles


class _Cursor:
    """Reads sounds by file and row; fast where the rows ascend, as a plan's do."""

    def __init__(self, working_folder: str, stack: ExitStack) -> None:
        self._working_folder = working_folder
        self._stack = stack
        self._location = ""
        self._file: pq.ParquetFile | None = None
        self._group_starts: list[int] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group = -1
        self._first_row = 0
        self._sounds: pa.Array = pa.array([], pa.binary())

    def read(self, clip: PlannedClip) -> bytes | DecodeError | None:
        """Returns a clip's bytes, None where the table has none, or what is wrong with the file there.

        Raises:
            OSError: a store behind a URL does not answer.
        """
        try:
            self._move_to(clip.file, clip.position)
            return self._sounds[clip.position - self._first_row].as_py()
        except (pa.ArrowException, OSError) as error:
            self._location = ""
            if storage.is_remote(clip.file):
                raise
            return DecodeError("unreadable row", str(error))

    def _move_to(self, location: str, row: int) -> None:
        if location != self._location:
            self._stack.close()
            stream = self._stack.enter_context(storage.open_input(from_folder(self._working_folder, location)))
            self._file = _parquet_file(stream, location)
            sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
            self._group_starts = [0, *accumulate(sizes)]
            self._location, self._group = location, -1
        group = bisect_right(self._group_starts, row) - 1
        if group != self._group or row < self._first_row:
            assert self._file is not None
            self._batches = self._file.iter_batches(_SOUNDS_AT_ONCE, row_groups=[group], columns=["audio.bytes"])
            self._group, self._first_row, self._sounds = group, self._group_starts[group], pa.array([], pa.binary())
        while row >= self._first_row + len(self._sounds):
            self._first_row += len(self._sounds)
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid(f"the file has no row {row} any more")
            self._sounds = batch.column(0).field("bytes")


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Returns the names that the Hub's metadata give the numbers of a file's columns of labels."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: _names_of(features[column]) for column in LABEL_FIELDS if column in features}
    except (ValueError, LookupError, TypeError, AttributeError):  # somebody else's metadata
        return {}
    return {column: names for column, names in found.items() if names}


def _names_of(feature: Any) -> tuple[str, ...]:
    """Returns the names of a ClassLabel, or of a list of them; empty for any other feature."""
    if isinstance(feature, list):
        return _names_of(feature[0])
    if "feature" in feature:  # Sequence, List, LargeList
        return _names_of(feature["feature"])
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if isinstance(names, dict):  # as the Hub's README files spell them
        names = [names[number] for number in sorted(names, key=int)]
    return tuple(map(str, names or ()))


def _holds_numbers(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_numbers(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """Yields a batch's rows; None stands for one with a text that isn't UTF-8, which Parquet's writers don't check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _sound_or_fault(found: bytes | DecodeError | None) -> bytes:
    if isinstance(found, DecodeError):
        raise found
    if found is None:
        raise DecodeError("no sound in the row", "the table has only its path")
    return found


def _parquet_file(stream: BinaryIO, location: str) -> pq.ParquetFile:
    try:
        # A buffer makes columns be read piece by piece, not a row group at once.
        file = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{location}: is not readable Parquet ({error})") from error
    schema = file.schema_arrow
    kind = schema.field("audio").type if "audio" in schema.names else None
    if kind is None or not pa.types.is_struct(kind) or {"bytes", "path"} - {item.name for item in kind}:
        raise ManifestError(
            f"{location}: has no column audio of bytes and path, as the Hugging Face Hub keeps sounds; "
            f"it has {', '.join(schema.names)}"
        )
    return file
