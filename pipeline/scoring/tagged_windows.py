"""What was heard → a table, JSON lines, CSV, Parquet, Audacity's labels: the same columns in all of them."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.runtime.output import console, print_json, print_line, print_table
from pipeline.storage import files as storage

Format = Literal["table", "windows", "jsonl", "csv", "parquet", "audacity"]
_EXTENSIONS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "audacity",
}
COLUMNS = ("file", "start_seconds", "end_seconds", "tag", "probability")
"""A row is one tag of one window, or one event."""
_TABLE_WINDOWS = 1000
"""A longer file gets another table, so that its windows need not be kept."""
_ROW_GROUP = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggedWindow:
    """The tags of one window of a file, of one step of its timeline, or an event, which is one tag."""

    file: str
    start_seconds: float
    end_seconds: float
    tags: tuple[tuple[str, float], ...]
    """(class name, probability 0 to 1), the most probable first."""

    def rows(self) -> Iterator[tuple[str, float, float, str, float]]:
        """Yields `COLUMNS` of each tag."""
        for tag, probability in self.tags:
            yield self.file, round(self.start_seconds, 3), round(self.end_seconds, 3), tag, round(probability, 4)


class TagWriter(ABC):
    """Takes windows in the order of the files and of time."""

    @abstractmethod
    def write(self, window: TaggedWindow) -> None:
        """Take one."""

    def end_file(self) -> None:  # noqa: B027
        """Take note that no more windows of this file come."""

    def close(self) -> None:  # noqa: B027
        """Bring out what is left; not called after an error."""


class _TableWriter(TagWriter):
    """A table for each file."""

    def __init__(self) -> None:
        self._windows: list[TaggedWindow] = []

    def write(self, window: TaggedWindow) -> None:
        self._windows.append(window)
        if len(self._windows) >= _TABLE_WINDOWS:
            self.end_file()

    def end_file(self) -> None:
        if not self._windows:
            return
        print_line(self._windows[0].file)  # a table's title would be broken to its width
        table = Table("seconds", "tag", "probability")
        table.columns[2].justify = "right"
        for window in self._windows:
            for order, (name, probability) in enumerate(window.tags):
                when = f"{window.start_seconds:.1f} to {window.end_seconds:.1f}" if order == 0 else ""
                table.add_row(when, Text(name), f"{probability:.3f}")
        print_table(table)
        self._windows = []

    close = end_file


class _LineWriter(TagWriter):
    """A line for each window, for who watches a stream."""

    def write(self, window: TaggedWindow) -> None:
        tags = "  ".join(f"{name} {probability:.3f}" for name, probability in window.tags)
        print_line(f"{window.start_seconds:9.1f} to {window.end_seconds:9.1f} s  {tags}")


class _WindowJsonWriter(TagWriter):
    """An object for each window, its tags in it."""

    def write(self, window: TaggedWindow) -> None:
        line = {
            "file": window.file,
            "start_seconds": round(window.start_seconds, 3),
            "end_seconds": round(window.end_seconds, 3),
            "tags": {name: round(probability, 4) for name, probability in window.tags},
        }
        print_json(line)


class _TextWriter(TagWriter):
    """Lines of text, written as they come.

    Args:
        stream: takes them.
        spell: a row → its lines.
    """

    def __init__(self, stream: IO[str], spell: Callable[[tuple[Any, ...]], str], head: str = "") -> None:
        self._stream, self._spell = stream, spell
        self._stream.write(head)

    def write(self, window: TaggedWindow) -> None:
        self._stream.write("".join(map(self._spell, window.rows())))
        self._stream.flush()


class _ParquetWriter(TagWriter):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = (pa.string(), pa.float64(), pa.float64(), pa.string(), pa.float64())
        self._schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
        self._file = parquet.ParquetWriter(path, self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._table = pa.Table

    def write(self, window: TaggedWindow) -> None:
        self._rows += window.rows()
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self._rows]
        self._file.write_table(self._table.from_pylist(rows, schema=self._schema))
        self._rows = []


class _LabelFolderWriter(TagWriter):
    """A file of Audacity's labels for each sound, called as it is with `.txt` behind that."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._file = ""
        self._lines: list[str] = []
        self._names: set[str] = set()

    def write(self, window: TaggedWindow) -> None:
        self._file = window.file
        self._lines += map(_label_line, window.rows())

    def end_file(self) -> None:
        if self._lines:
            storage.publish_bytes(storage.join_path(self._folder, self._free_name()), "".join(self._lines).encode())
        self._lines = []

    close = end_file

    def _free_name(self) -> str:
        base, number = PurePosixPath(self._file.replace("\\", "/")).name or "sound", 1
        name = f"{base}.txt"
        while name in self._names:  # of another folder
            number += 1
            name = f"{base} ({number}).txt"
        self._names.add(name)
        return name


def _json_line(row: tuple[Any, ...]) -> str:
    return json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n"


def _csv_line(row: tuple[Any, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _label_line(row: tuple[Any, ...]) -> str:
    """Spell a row as Audacity's importer reads it: two times in seconds with a point, then the text, tabs between."""
    _, start, end, tag, _ = row
    return f"{start:.6f}\t{end:.6f}\t{' '.join(str(tag).split())}\n"


_SPELLINGS = {"jsonl": (_json_line, ""), "csv": (_csv_line, ",".join(COLUMNS) + "\n"), "audacity": (_label_line, "")}


def choose_format(form: Format | None, out: str | None) -> Format:
    """Returns in which format to write.

    Args:
        form: what was asked for; None goes by the name of `out`.
        out: where to write; None is standard output.

    Raises:
        UsageError: the name says nothing, or the format can't be written there.
    """
    if form is None:
        if out is None:
            return "table"
        form = _EXTENSIONS.get(PurePosixPath(storage.file_name(out)).suffix.lower())
        if form is None:
            formats = ", ".join(name for name in get_args(Format) if name not in ("table", "windows"))
            raise UsageError(f"--out {out}: its name does not say the format. Name it .jsonl, .csv, .parquet or .txt "
                             f"(Audacity's labels), or give --format ({formats})")  # fmt: skip
    if form == "parquet" and out is None:
        raise UsageError("--format parquet: a Parquet file needs a name: give --out tags.parquet")
    if form in ("table", "windows") and out is not None:
        raise UsageError(f"--format {form} is for standard output; for --out choose jsonl, csv, parquet or audacity")
    return form


@contextmanager
def open_writer(form: Format, out: str | None, *, live: bool = False, several: bool = False) -> Iterator[TagWriter]:
    """Yields what takes the windows; a file appears, whole, when the block ends without an error.

    Args:
        form: from `choose_format`.
        out: a path or URL; None is standard output.
        live: write each window at once.
        several: there may be more than one sound: Audacity's labels, which don't say whose they are, then go into a
            folder of that name.

    Raises:
        StorageError: it can't be written.
    """
    if form in ("table", "windows"):
        writer = _WindowJsonWriter() if form == "windows" else _LineWriter() if live else _TableWriter()
        yield writer
        writer.close()
        return
    if form == "audacity" and several and out is not None:
        writer = _LabelFolderWriter(out)
        yield writer
        writer.close()
        return
    with ExitStack() as stack:
        path = None if out is None else stack.enter_context(storage.publish(out))
        if form == "parquet":
            assert path is not None
            writer = _ParquetWriter(path)
        else:
            stream = console().file if path is None else stack.enter_context(path.open("w", encoding="utf-8"))
            writer = _TextWriter(stream, *_SPELLINGS[form])
        yield writer
        writer.close()
