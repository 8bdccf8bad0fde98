"""Parquet files as the Hugging Face Hub keeps sounds: agkphysics/AudioSet and what is made like it."""

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

from pipeline.dataset.clip_ids import without_extension
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import DecodeError, ManifestError
from pipeline.ingest.descriptions import ID_FIELDS, LABEL_FIELDS, clip_id_of, labels_of
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle, Source, from_folder, versioned_files
from pipeline.storage import files as storage

_SCANNED_AT_ONCE = 1 << 14
_SOUNDS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HuggingFaceSource(Source):
    """Rows of `video_id`, `audio` (a struct of bytes and path), `labels` (mids) and `human_labels` (names).

    Other spellings of id and labels are those of `descriptions`. Of a file's sounds no more is in memory than a page of
    the column, which the Hub's writer cuts at 100 rows.
    """

    paths: tuple[str, ...]
    """Parquet files, or folders of them, local or URLs."""
    working_folder: str = field(default_factory=os.getcwd)
    """What paths that aren't absolute are relative to."""

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through all columns but the sounds.

        Raises:
            ManifestError: a file is no Parquet, or has no column of sounds.
            UsageError: a path is not there.
        """
        for location, version in versioned_files(self.paths, (".parquet",), "--parquet"):
            with storage.open_input(from_folder(self.working_folder, location)) as stream:
                file = _parquet_file(stream, location)
                names = [name for name in (*ID_FIELDS, *LABEL_FIELDS) if name in file.schema_arrow.names]
                position = 0
                for batch in file.iter_batches(_SCANNED_AT_ONCE, columns=[*names, "audio.path"]):
                    for row in batch.to_pylist():
                        yield self._clip(location, version, position, row, vocabulary)
                        position += 1

    def _clip(
        self, location: str, version: str, position: int, row: dict[str, Any], vocabulary: Vocabulary
    ) -> PlannedClip | Rejection:
        path = (row["audio"] or {}).get("path") or f"row {position}"
        try:
            clip_id = clip_id_of(row, without_extension(path))
            return PlannedClip(clip_id, location, version, labels_of(row, vocabulary), member=path, position=position)
        except UnusableClipError as error:
            return Rejection(None, f"{location}/{path}", error.reason, error.detail)

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
