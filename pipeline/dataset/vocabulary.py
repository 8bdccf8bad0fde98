"""The classes that a dataset's labels point into: `classes.csv`, in the format of AudioSet's own list."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from pipeline.dataset.clip_ids import has_control_characters
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
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{location}: is not a CSV file in UTF-8 ({error})") from error
    if not rows or [field.strip() for field in rows[0][1]] != _HEADER:
        raise ManifestError(f"{location}:1: a class list begins with the line `{','.join(_HEADER)}`")
    yield from rows[1:]
