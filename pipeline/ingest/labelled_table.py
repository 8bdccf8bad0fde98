"""Any CSV with a column of paths and a column of labels, and the folder that the paths are in."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.clip_ids import clip_id_of_path, without_extension
from pipeline.dataset.shards import AUDIO_FORMATS
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.audio_files import file_version, open_file_reader
from pipeline.ingest.descriptions import indices_of
from pipeline.ingest.own_classes import vocabulary_of
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, Source
from pipeline.storage import files as storage


@dataclass(frozen=True, kw_only=True, slots=True)
class TableColumns:
    """How to read the table."""

    path: str
    """The column of paths, relative to the folder of sounds; their extension may be missing."""
    label: str
    id: str | None = None
    """The column of clip ids; without, the paths give them."""
    label_separator: str | None = None
    """What is between the labels of one clip; None takes the whole field as one."""
    delimiter: str = ","
    only: tuple[tuple[str, str], ...] = ()
    """Columns and the values that a row has to have in them to be taken."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns the columns that have to be there."""
        return (self.path, self.label, *([self.id] if self.id else []), *(name for name, _ in self.only))


@dataclass(frozen=True, slots=True)
class LabelledTableSource(Source):
    """The rows of tables, in their order. Rows that name the same file are one clip with all their labels."""

    tables: tuple[str, ...]
    audio: Path
    columns: TableColumns
    whole_names: bool = False
    """Take each path as the id, even where its name looks like a YouTube id with a prefix or times."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the labels that occur, in the order of their characters' codes, numbers by their value."""
        rows = (row for table in self.tables for row in _rows(table, self.columns))
        labels = (label for row in rows if isinstance(row, _Row) for label in row.labels)
        return vocabulary_of(labels, " ".join(self.tables))

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the rows, and look for each file.

        Raises:
            ManifestError: a table is no CSV, or lacks a column.
        """
        clips: dict[str, _Clip] = {}
        for table in self.tables:
            for row in _rows(table, self.columns):
                if isinstance(row, Rejection):
                    yield row
                    continue
                clip = clips.setdefault(row.path, _Clip(row.clip_id))
                try:
                    clip.labels = tuple(sorted({*clip.labels, *indices_of(row.labels, vocabulary)}))
                except UnusableClipError as error:
                    clip.fault = clip.fault or error
        for path, clip in clips.items():
            yield self._planned(path, clip)

    def _planned(self, named: str, clip: "_Clip") -> PlannedClip | Rejection:
        path = self._find(named)
        name = without_extension(path or named)
        clip_id = clip.clip_id or (name if self.whole_names else clip_id_of_path(name))
        if clip.fault is not None:
            return Rejection(clip_id, path or named, clip.fault.reason, clip.fault.detail)
        if path is None:
            return Rejection(clip_id, named, "file missing")
        return PlannedClip(clip_id, path, file_version(self.audio / path), clip.labels)

    def _find(self, named: str) -> str | None:
        """Returns the path of the file, relative to the folder where it is in it; it may lack its extension."""
        spellings = []
        for location in map(Path, dict.fromkeys((named, named.replace("\\", "/")))):  # a table may come from Windows
            path = location.relative_to(self.audio) if location.is_relative_to(self.audio) else location
            spellings += [path.as_posix(), *(f"{path.as_posix()}.{extension}" for extension in sorted(AUDIO_FORMATS))]
        try:
            return next((spelling for spelling in spellings if (self.audio / spelling).is_file()), None)
        except (OSError, ValueError):  # a name that no file can have
            return None

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the folder."""
        return open_file_reader(self.audio)


@dataclass(slots=True)
class _Row:
    path: str
    clip_id: str | None
    labels: list[str]


@dataclass(slots=True)
class _Clip:
    clip_id: str | None
    labels: tuple[int, ...] = ()
    fault: UnusableClipError | None = None


def _rows(table: str, columns: TableColumns) -> Iterator[_Row | Rejection]:
    """Read one table.

    Raises:
        ManifestError: it is no CSV, or lacks a column.
        PipelineError: it is not there.
    """
    with storage.open_input(table) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=columns.delimiter, strict=True, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            place = {name: _place(header, name, table) for name in columns.needed}
            for row in filter(None, reader):
                where = f"{table}:{reader.line_num}"
                if len(row) != len(header):
                    yield Rejection(None, where, "malformed row", f"{len(row)} fields, but {len(header)} columns")
                elif any(row[place[name]].strip() != value for name, value in columns.only):
                    continue
                elif not (path := row[place[columns.path]].strip()):
                    yield Rejection(None, where, "malformed row", f"nothing in the column {columns.path}")
                else:
                    clip_id = row[place[columns.id]].strip() if columns.id else None
                    yield _Row(path, clip_id, _labels(row[place[columns.label]], columns.label_separator))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(
                f"{table}:{reader.line_num}: is no CSV in UTF-8 with {columns.delimiter!r} between its fields ({error})"
            ) from error


def _place(header: list[str], name: str, table: str) -> int:
    if header.count(name) != 1:
        found = "twice" if name in header else "not"
        raise UsageError(
            f"{table}: the column {name!r} is {found} there; its columns are {', '.join(header) or 'none'}"
        )
    return header.index(name)


def _labels(text: str, separator: str | None) -> list[str]:
    parts = text.split(separator) if separator else [text]
    return [part.strip() for part in parts if part.strip()]
