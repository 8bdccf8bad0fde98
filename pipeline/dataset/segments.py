"""AudioSet's segment lists: which clip, from when to when, with which labels."""

import csv
import io
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.clip_ids import has_control_characters
from pipeline.dataset.row_tables import table_of_rows
from pipeline.dataset.string_columns import first_rows, repeated_rows
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

    Lines that begin with `#` are comments; every other line is `YTID, start_seconds, end_seconds, "mid,mid"`. An empty
    last field is a clip without labels.

    Returns:
        The lines in their order, in `SEGMENT_SCHEMA`.

    Raises:
        ManifestError: a line is malformed, names an unknown class, has impossible times or repeats a clip; the message
            names file and line of the first few.
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
    """Yields (number, text) for each line that isn't a comment."""
    with storage.open_input(csv_path) as stream:
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), start=1):
                if line.strip() and not line.startswith("#"):
                    yield number, line
        except UnicodeDecodeError as error:
            raise ManifestError(f"{csv_path}: is not a text file in UTF-8 ({error})") from error


def _parse_line(line: str, vocabulary: Vocabulary) -> _Segment:
    # One reader a line: a quote that is never closed spoils its own line and not the rest of the file.
    try:
        fields = next(csv.reader([line], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise _LineError(f"not CSV ({error})") from error
    if len(fields) != 4:
        raise _LineError(f'has {len(fields)} fields; a segment is `YTID, start_seconds, end_seconds, "mid,mid"`')
    clip_id, start, end, mids = fields
    if not clip_id or has_control_characters(clip_id):
        raise _LineError(f"{clip_id!r} is no clip id")
    start_seconds, end_seconds = _seconds(start), _seconds(end)
    if not 0 <= start_seconds < end_seconds:
        raise _LineError(f"the times {start}, {end} are impossible; a clip starts at 0 s or later and ends after that")
    return _Segment(clip_id, start_seconds, end_seconds, _labels(mids, vocabulary))


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
    try:
        return tuple(sorted({index_by_mid[mid.strip()] for mid in mids.split(",")})) if mids.strip() else ()
    except KeyError as error:
        raise _LineError(f"the class {error.args[0]!r} is not among the {len(vocabulary)} classes") from error
