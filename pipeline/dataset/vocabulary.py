"""The classes that a dataset's labels point into: `classes.csv`, in the format of AudioSet's own list."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from pipeline.dataset.clip_ids import has_control_characters
from pipeline.dataset.text_lists import TableError, is_error_value, is_text, read_table
from pipeline.errors import ManifestError
from pipeline.storage import files as storage

_HEADER = ["index", "mid", "display_name"]
_MAX_CLASSES = 32_767
"""A manifest keeps class indices as int16."""


@dataclass(frozen=True, slots=True)
class LabelClass:
    """One class of sounds."""

    index: int
    """Position in the vocabulary and in every vector of logits, from 0."""
    mid: str
    """What label files call the class: AudioSet's machine id such as `/m/09x0r`, or any text of your own."""
    name: str
    """What people call it, such as `Speech`."""


@dataclass(frozen=True)
class Vocabulary:
    """An ordered list of classes."""

    classes: tuple[LabelClass, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def sha256(self) -> str:
        """The hex digest of the list's canonical spelling; equal lists have equal digests."""
        return sha256(self.to_csv_bytes()).hexdigest()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The display names, in order."""
        return tuple(label.name for label in self.classes)

    def index_of(self, mid: str) -> int:
        """Returns the position of the class `mid`.

        Raises:
            KeyError: there is no such class.
        """
        return self.index_by_mid[mid]

    @cached_property
    def index_by_mid(self) -> dict[str, int]:
        """Machine id → position."""
        return {label.mid: label.index for label in self.classes}

    @cached_property
    def index_by_name(self) -> dict[str, int]:
        """Display name → position; a name that two classes share is left out."""
        names = self.names
        return {label.name: label.index for label in self.classes if names.count(label.name) == 1}

    @cached_property
    def has_numbers_for_names(self) -> bool:
        """Whether a class is called by a number, so that a number in a text may mean that one."""
        return any(text.isdecimal() for label in self.classes for text in (label.mid, label.name))

    def to_csv_bytes(self) -> bytes:
        """Returns the list as `class_labels_indices.csv` does: AudioSet's own list gives AudioSet's own bytes."""
        lines = [",".join(_HEADER)]
        lines += [f"{label.index},{_quote_if_needed(label.mid)},{_quote(label.name)}" for label in self.classes]
        return ("\n".join(lines) + "\n").encode()


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _quote_if_needed(text: str) -> str:
    return _quote(text) if any(char in text for char in ',"') else text


@cache
def audioset_vocabulary() -> Vocabulary:
    """Returns AudioSet's 527 classes, from the list in `manifests`."""
    return parse_vocabulary(
        files("manifests").joinpath("audioset_classes.csv").read_bytes(), "manifests/audioset_classes.csv"
    )


def read_vocabulary(location: str | Path) -> Vocabulary:
    """Read a class list: a header `index,mid,display_name`, then one line a class, numbered from 0.

    Raises:
        ManifestError: the file is malformed; the message names the line.
        PipelineError: the file is not there.
    """
    return parse_vocabulary(storage.read_bytes(location), str(location))


def parse_vocabulary(content: bytes, location: str) -> Vocabulary:
    """Read a class list's bytes; `location` is what errors call it.

    Raises:
        ManifestError: they are malformed; the message names the line.
    """
    classes: list[LabelClass] = []
    mids: set[str] = set()
    for line, row in _rows(content, location):
        where = f"{location}:{line}"
        if len(row) != len(_HEADER):
            raise ManifestError(f"{where}: has {len(row)} fields; a class is `index,mid,display_name`")
        index, mid, name = row
        if index != str(len(classes)):
            raise ManifestError(
                f"{where}: index {index!r}, expected {len(classes)}; number the classes from 0 in order"
            )
        if not is_text(row):
            raise ManifestError(f"{where}: is not in UTF-8: {ascii(','.join(row))[:100]}")
        if is_error_value(mid):
            raise ManifestError(f"{where}: {mid!r} is what a spreadsheet wrote over the class; put the class back")
        if not mid or has_control_characters(mid + name):
            raise ManifestError(f"{where}: a class needs a mid, and text without control characters: {mid!r}, {name!r}")
        if mid in mids:
            raise ManifestError(f"{where}: the class {mid!r} is there twice; keep one")
        mids.add(mid)
        classes.append(LabelClass(len(classes), mid, name))
    if not 0 < len(classes) <= _MAX_CLASSES:
        raise ManifestError(f"{location}: holds {len(classes)} classes; a class list has 1 to {_MAX_CLASSES}")
    return Vocabulary(tuple(classes))


def _rows(content: bytes, location: str) -> Iterator[tuple[int, list[str]]]:
    rows = read_table(io.BytesIO(content), set(_HEADER), skip_spaces=False)
    try:
        line, head = next(rows, (1, []))
        if [field.strip() for field in head[: len(_HEADER)]] != _HEADER:
            raise ManifestError(f"{location}:{line}: a class list begins with the line `{','.join(_HEADER)}`")
        for line, row in rows:
            while len(row) > len(_HEADER) and not row[-1]:
                row.pop()  # spreadsheets fill rows up
            yield line, row
    except TableError as error:
        raise ManifestError(f"{location}:{error.line}: is not a CSV file in UTF-8 ({error})") from error
