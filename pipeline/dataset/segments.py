"""AudioSet's segment lists: which clip, from when to when, with which labels."""

import csv
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.clip_ids import has_control_characters
from pipeline.dataset.row_tables import table_of_rows
from pipeline.dataset.string_columns import first_rows, repeated_rows
from pipeline.dataset.text_lists import DELIMITERS, is_error_value, is_text, open_text, spreadsheet_damage
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError
from pipeline.storage import files as storage

SEGMENT_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("start_seconds", pa.float64()),  # from the beginning of the video
        pa.field("end_seconds", pa.float64()),
        pa.field("labels", pa.list_(pa.int16())),  # class indices into the vocabulary, ascending
    ]
)
"""One row a line of a segments file; two million are 80 MB."""

_MAX_FAULTS_SHOWN = 5


def read_segment_files(csv_paths: Iterable[str | Path], vocabulary: Vocabulary) -> pa.Table:
    """Read segments files, such as AudioSet's `balanced_train_segments.csv`, as one; a clip may occur only once.

    A clip's line is `YTID, start_seconds, end_seconds, "mid,mid"`; an empty last field is a clip without labels.
    Fields may be separated by semicolons or tabs, and quoted once more, as spreadsheets save them. Comments begin with
    `#` and are the list's head, or another list's head where two were joined; no line of a clip is one.

    Returns:
        The clips in their order, in `SEGMENT_SCHEMA`.

    Raises:
        ManifestError: a line is malformed, names an unknown class, has impossible times, repeats a clip, or was changed
            by a spreadsheet; the message names file and line of the first few.
        PipelineError: a file is not there.
    """
    places = _Places([str(path) for path in csv_paths])
    segments = table_of_rows(_segments(places, vocabulary), SEGMENT_SCHEMA)
    _find_repeats(segments, places)
    if places.faults:
        first = sorted(places.faults)[:_MAX_FAULTS_SHOWN]
        shown = "\n".join(f"{places.files[file]}:{line}: {fault}" for file, line, fault in first)
        more = f"\nand {len(places.faults) - len(first)} more" if len(places.faults) > len(first) else ""
        raise ManifestError(f"{shown}{more}\nCorrect or delete these lines.")
    return segments


class _LineError(Exception):
    """What is wrong with one line."""


@dataclass(slots=True)
class _Segment:
    clip_id: str
    start_seconds: float
    end_seconds: float
    labels: tuple[int, ...]


@dataclass(slots=True)
class _Places:
    """Where each good line stands, and what is wrong with the others."""

    files: list[str]
    file_of_row: array = field(default_factory=lambda: array("i"))
    line_of_row: array = field(default_factory=lambda: array("i"))
    faults: list[tuple[int, int, str]] = field(default_factory=list)


def _segments(places: _Places, vocabulary: Vocabulary) -> Iterator[_Segment]:
    for file, path in enumerate(places.files):
        for number, line in _lines(path):
            try:
                segment = _parse_line(line, vocabulary)
            except _LineError as error:
                places.faults.append((file, number, str(error)))
                continue
            places.file_of_row.append(file)
            places.line_of_row.append(number)
            yield segment


def _find_repeats(segments: pa.Table, places: _Places) -> None:
    ids = segments["clip_id"].combine_chunks()
    repeats = repeated_rows(ids)
    firsts = first_rows(ids.take(pa.array(repeats)), ids)
    for row, first in zip(repeats.tolist(), firsts.tolist(), strict=True):
        there = f"{places.files[places.file_of_row[first]]}:{places.line_of_row[first]}"
        fault = f"the clip {ids[row].as_py()!r} is at {there} already"
        places.faults.append((places.file_of_row[row], places.line_of_row[row], fault))


def _lines(csv_path: str) -> Iterator[tuple[int, str]]:
    """Yields (number, text) for each line of a clip."""
    in_head = True
    with storage.open_input(csv_path) as stream:
        try:
            for number, line in enumerate(open_text(stream), start=1):
                line = line.removeprefix("\ufeff")  # of a list that was joined to another
                if line.strip(" \t\r\n,;") and not _is_comment(line, in_head=in_head):
                    in_head = False
                    yield number, line
        except UnicodeDecodeError as error:
            raise ManifestError(f"{csv_path}: is not a text file in UTF-8 ({error})") from error


_AUDIOSETS_HEAD = re.compile(r'"?#?\s*(segments csv|num_ytids|ytid\b)', re.IGNORECASE)
"""How the three lines begin that AudioSet's own lists have before their clips; joined lists have them within."""
_OTHERS_HEAD = re.compile(r'"?#|sep=')
"""How the lines begin that other lists may have there; the second is Excel's, which names the delimiter."""


def _is_comment(line: str, *, in_head: bool) -> bool:
    """Whether a line belongs to a list's head; what has a clip's times, or a damaged id, does not."""
    if not (_AUDIOSETS_HEAD.match(line) or (in_head and _OTHERS_HEAD.match(line))):
        return False
    try:
        fields = _fields(line)
    except _LineError:
        return True
    return not _has_times(fields) and not (len(fields) == 4 and is_error_value(fields[0]))


def _parse_line(line: str, vocabulary: Vocabulary) -> _Segment:
    fields = _fields(line)
    if not is_text(fields):
        raise _LineError(f"is not in UTF-8: {ascii(line.strip())[:100]}")
    clip_id = fields[0]
    if damage := spreadsheet_damage(clip_id):
        raise _LineError(f"{clip_id!r} is no clip id but {damage}; take the line from the list as it was before")
    if clip_id.startswith("#"):
        raise _LineError("begins with #, but only the head of a list has comments; take the line out, or the # away")
    if len(fields) != 4:
        raise _LineError(f'has {len(fields)} fields; a segment is `YTID, start_seconds, end_seconds, "mid,mid"`')
    _, start, end, mids = fields
    if not clip_id or has_control_characters(clip_id):
        raise _LineError(f"{clip_id!r} is no clip id")
    start_seconds, end_seconds = _seconds(start), _seconds(end)
    if not 0 <= start_seconds < end_seconds:
        raise _LineError(f"the times {start}, {end} are impossible; a clip starts at 0 s or later and ends after that")
    return _Segment(clip_id, start_seconds, end_seconds, _labels(mids, vocabulary))


def _fields(line: str) -> list[str]:
    """Cut a line at the delimiter that gives it a clip's times, or else at its commas."""
    cuts: list[list[str]] = []
    faults: list[_LineError] = []
    for delimiter in DELIMITERS:
        try:
            cuts.append(_cut(line, delimiter))
        except _LineError as error:
            faults.append(error)
            continue
        if _has_times(cuts[-1]):
            return cuts[-1]
    if faults:
        raise faults[0]
    return cuts[0]


def _cut(line: str, delimiter: str) -> list[str]:
    # One reader a line: a quote that is never closed spoils its own line and not the rest of the file.
    try:
        fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise _LineError(f"not CSV ({error})") from error
    if len(fields) == 1 and fields[0] and line.startswith('"'):  # a spreadsheet took the line for one field
        return _cut(fields[0], delimiter)
    while len(fields) > 4 and not fields[-1]:
        fields.pop()
    if len(fields) > 4 and fields[3].lstrip().startswith('"') and fields[-1].rstrip().endswith('"'):
        fields[3:] = [",".join(fields[3:])]  # a spreadsheet took the quotes for text, and the comma in them for its own
    if delimiter != ",":
        fields[1:3] = [field.replace(",", ".") for field in fields[1:3]]
    return fields


def _has_times(fields: list[str]) -> bool:
    try:
        return len([float(field) for field in fields[1:3]]) == 2
    except ValueError:
        return False


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _LineError(f"{text!r} is no time in seconds")
    return seconds


def _labels(mids: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    index_by_mid = vocabulary.index_by_mid
    mids = mids.strip().strip('"')
    try:
        return tuple(sorted({index_by_mid[mid.strip()] for mid in mids.split(",")})) if mids.strip() else ()
    except KeyError as error:
        raise _LineError(f"the class {error.args[0]!r} is not among the {len(vocabulary)} classes") from error
