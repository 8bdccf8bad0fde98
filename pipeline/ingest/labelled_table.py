"""Any CSV with a column of paths and a column of labels, and the folder that the paths are in."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.clip_ids import clip_id_of_path, without_extension
from pipeline.dataset.shards import AUDIO_FORMATS
from pipeline.dataset.text_lists import TableError, is_error_value, is_text, read_table, spreadsheet_damage
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.audio_files import file_version, open_file_reader
from pipeline.ingest.labels import LabelField
from pipeline.ingest.own_classes import NEEDS_CLASSES, vocabulary_of
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import ClipReader, PlannedClip, Source
from pipeline.storage import files as storage


@dataclass(frozen=True, kw_only=True, slots=True)
class TableColumns:
    """How to read the table."""

    path: str
    """The column of paths, relative to the folder of sounds; their extension may be missing."""
    label: str
    empty_is_unknown: bool = False
    """Whether nobody knows the labels of a row with nothing in the column of labels, or of a table without it."""
    id: str | None = None
    """The column of clip ids; without, the paths give them."""
    label_separator: str | None = None
    """What is between the labels of one clip; None takes the whole field as one."""
    delimiter: str | None = None
    """What is between two fields; None is what gives the first line all the columns."""
    only: tuple[tuple[str, str], ...] = ()
    """Columns and the values that a row has to have in them to be taken."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns the columns that have to be there."""
        label = [] if self.empty_is_unknown else [self.label]
        return (self.path, *label, *([self.id] if self.id else []), *(name for name, _ in self.only))


@dataclass(frozen=True, slots=True)
class LabelledTableSource(Source):
    """The rows of tables, in their order. Rows that name the same file are one clip with all their labels."""

    tables: tuple[str, ...]
    audio: Path
    columns: TableColumns
    whole_names: bool = False
    """Take each path as the id, even where its name looks like a YouTube id with a prefix or times."""
    numbered: bool = False
    """Whether the user said which list class numbers are of: the vocabulary."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the labels that occur, in the order of their characters' codes, numbers by their value.

        Raises:
            ManifestError: they are vectors of zeros and ones, or a table is no CSV.
            UsageError: a table lacks a column.
        """
        field, labels = LabelField(Vocabulary(()), numbered=False), set[str]()
        for row in self._labelled_rows():
            field.look_at(row.labels)
            labels.update(row.labels)
        tables = " ".join(self.tables)
        if field.holds_vectors:
            raise ManifestError(
                f"{tables}: the column {self.columns.label} holds vectors of zeros and ones, which name no classes. "
                "Say by --classes which class has which place"
            )
        if self.columns.empty_is_unknown and not labels:
            raise UsageError(NEEDS_CLASSES)
        return vocabulary_of(labels, tables)

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the rows, and look for each file.

        Raises:
            ManifestError: a table is no CSV, or lacks a column.
        """
        field = LabelField(vocabulary, numbered=self.numbered)
        for row in self._labelled_rows() if self.columns.label_separator else ():
            field.look_at(row.labels)
        clips: dict[str, _Clip] = {}
        for table in self.tables:
            for row in _rows(table, self.columns):
                if isinstance(row, Rejection):
                    yield row
                    continue
                clip = clips.setdefault(row.path, _Clip(row.clip_id, row.suspicion))
                try:
                    clip.labels = tuple(sorted({*clip.labels, *field.read(row.labels)}))
                except UnusableClipError as error:
                    clip.fault = clip.fault or error
        for path, clip in clips.items():
            yield self._planned(path, clip)

    def _labelled_rows(self) -> Iterator["_Row"]:
        for table in self.tables:
            yield from (row for row in _rows(table, self.columns) if isinstance(row, _Row))

    def _planned(self, named: str, clip: "_Clip") -> PlannedClip | Rejection:
        path = self._find(named)
        name = without_extension(path or named)
        clip_id = clip.clip_id or (name if self.whole_names else clip_id_of_path(name))
        if clip.fault is not None:
            return Rejection(clip_id, path or named, clip.fault.reason, clip.fault.detail)
        if path is None:
            return Rejection(clip_id, named, "file missing", clip.suspicion)
        mask = () if self.columns.empty_is_unknown and not clip.labels else None
        return PlannedClip(clip_id, path, file_version(self.audio / path), clip.labels, label_mask=mask)

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
    clip_id: str
    labels: list[str]
    suspicion: str
    """Where its path looks as if a spreadsheet had made it of another one."""


@dataclass(slots=True)
class _Clip:
    clip_id: str
    suspicion: str
    labels: tuple[int, ...] = ()
    fault: UnusableClipError | None = None


def _rows(table: str, columns: TableColumns) -> Iterator[_Row | Rejection]:
    """Read one table.

    Raises:
        ManifestError: it is no CSV, or lacks a column.
        PipelineError: it is not there.
    """
    with storage.open_input(table) as stream:
        rows = read_table(stream, set(columns.needed), columns.delimiter, skip_spaces=True)
        try:
            _, head = next(rows, (1, []))
            header = [name.strip() for name in head]
            wanted = [*columns.needed, *([columns.label] if columns.label in header else [])]
            place = {name: _place(header, name, table) for name in wanted}
            for line, row in rows:
                where = f"{table}:{line}"
                while len(row) > len(header) and not row[-1]:
                    row.pop()  # spreadsheets fill rows up
                if len(row) != len(header):
                    yield Rejection(None, where, "malformed row", f"{len(row)} fields, but {len(header)} columns")
                    continue
                cells = {name: row[index].strip() for name, index in place.items()}
                if all(cells[name] == value for name, value in columns.only):
                    yield _row(cells, columns, where)
        except TableError as error:
            between = columns.delimiter or ","
            raise ManifestError(
                f"{table}:{error.line}: is no CSV in UTF-8 with {between!r} between its fields ({error})"
            ) from error


def _row(cells: Mapping[str, str], columns: TableColumns, where: str) -> _Row | Rejection:
    path, label, clip_id = (cells.get(name or "", "") for name in (columns.path, columns.label, columns.id))
    fault = ""
    if not is_text(cells.values()):
        fault = f"is not in UTF-8: {ascii(path)[:100]}"
    elif not path:
        fault = f"nothing in the column {columns.path}"
    elif damage := spreadsheet_damage(clip_id):
        fault = f"{clip_id!r} is no clip id but {damage}"
    elif is_error_value(label):
        fault = f"{label!r} is no label but what a spreadsheet wrote over it"
    if fault:
        return Rejection(None, where, "malformed row", fault)
    damage = spreadsheet_damage(path)
    return _Row(
        path=path,
        clip_id=clip_id,
        labels=_labels(label, columns.label_separator),
        suspicion=f"{where}: perhaps {damage}" if damage else "",
    )


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
