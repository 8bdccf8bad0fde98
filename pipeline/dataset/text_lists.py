"""Lists in text files as people keep them: in the encodings that programs save, and after a spreadsheet had them.

A spreadsheet that opens a list takes fields for what they look like: `-BBBBBBBBBB` for a formula, `12345678901234` for
a number. What it saves then is another text, or the name of an error.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Set
from typing import BinaryIO, TextIO

from pipeline.dataset.clip_ids import is_youtube_id

DELIMITERS = (",", ";", "\t")
"""What is between two fields: in the format's own spelling, and as spreadsheets of other countries save it."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_ERROR_VALUE = re.compile(r"#([\w/¡¿]{2,}[?!]|N/[AD]|NV|#{2,})")
"""`#NAME?`, `#DIV/0!`, `#N/A` … in the languages of the world; `####` is a column too narrow for its number."""
_FORMULA = re.compile(r'[=]([-+"].+|[\w-]{11})')
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?E[+-]\d+", re.IGNORECASE)
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")


def open_text(stream: BinaryIO) -> TextIO:
    """Returns a list as text: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Bytes that are no UTF-8 come as lone surrogates, so that their line can be named; see `is_text`.
    """
    mark = stream.read(2)
    stream.seek(0)
    encoding = "utf-16" if mark in _UTF16_MARKS else "utf-8-sig"
    return io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="")


class TableError(Exception):
    """What a table holds is not what its delimiter, quotes and encoding promise."""

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(fault)
        self.line = line
        """The number of the line where that shows."""


def read_table(
    stream: BinaryIO, columns: Set[str], delimiter: str | None = None, *, skip_spaces: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a table, the names of its columns first, each with the number of the line that it ends in.

    Rows of nothing but empty fields are passed over.

    Args:
        stream: the file.
        columns: the columns that have to be there.
        delimiter: what is between two fields; None takes the one that gives the first line all of `columns`.
        skip_spaces: whether spaces behind a delimiter are no part of the field.

    Raises:
        TableError: the file is no such table from some line on.
    """
    text = open_text(stream)
    reader = csv.reader(text)
    try:
        head = text.readline()
        if excels := _NAMED_DELIMITER.match(head):
            delimiter, head = delimiter or excels[1], text.readline()
        text.seek(0)
        delimiter = delimiter or _delimiter_of(head, columns)
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=skip_spaces)
        for row in reader:
            if any(row) and not (reader.line_num == 1 and excels):
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise TableError(reader.line_num, str(error)) from error


_NAMED_DELIMITER = re.compile(r"sep=(.)\r?\n?$")
"""Excel's own first line."""


def _delimiter_of(head: str, columns: Set[str]) -> str:
    for delimiter in DELIMITERS:
        names = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
        if columns <= {name.strip() for name in names}:
            return delimiter
    return DELIMITERS[0]


def is_text(fields: Iterable[str]) -> bool:
    """Whether all fields of a line were text in the list's encoding."""
    return not any(_NOT_UTF8.search(field) for field in fields)


def is_error_value(text: str) -> bool:
    """Whether a spreadsheet wrote the name of an error, such as `#NAME?`, in the place of a text."""
    return _ERROR_VALUE.fullmatch(text) is not None


def spreadsheet_damage(name: str) -> str:
    """Returns what a spreadsheet seems to have made of a name; empty where there is no sign of it."""
    if is_error_value(name):
        return "an error's name that a spreadsheet wrote over it"
    if _FORMULA.fullmatch(name):
        return "a formula that a spreadsheet made of it"
    if _NUMBER.fullmatch(name) and not is_youtube_id(name):
        return "a number that a spreadsheet made of it"
    return ""
