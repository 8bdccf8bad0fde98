"""AudioSet's segment lists: which clip, from when to when, with which labels."""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.clip_ids import has_control_characters
from pipeline.errors import ManifestError
from pipeline.vocabulary import Vocabulary

_MOST_FAULTS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of a segments file."""

    clip_id: str
    start_seconds: float
    """From the beginning of the video."""
    end_seconds: float
    labels: tuple[int, ...]
    """Class indices into the vocabulary, ascending."""


def read_segments(csv_path: str | Path, vocabulary: Vocabulary) -> list[Segment]:
    """Read one segments file, such as AudioSet's `balanced_train_segments.csv`.

    Lines that begin with `#` are comments; every other line is `YTID, start_seconds, end_seconds, "mid,mid"`. An empty
    last field is a clip without labels.

    Raises:
        ManifestError: a line is malformed, names an unknown class, has impossible times or repeats a clip; the message
            names file and line of the first few.
        PipelineError: the file is not there.
    """
    return read_segment_files([csv_path], vocabulary)


def read_segment_files(csv_paths: Iterable[str | Path], vocabulary: Vocabulary) -> list[Segment]:
    """Read several segments files as one; a clip may occur in only one of them.

    Raises:
        ManifestError: as `read_segments`.
        PipelineError: a file is not there.
    """
    segments: list[Segment] = []
    first_place: dict[str, tuple[str, int]] = {}
    faults: list[str] = []
    for path, number, line in _lines(csv_paths):
        try:
            segment = _parse_line(line, vocabulary)
        except _LineError as error:
            faults.append(f"{path}:{number}: {error}")
            continue
        if segment.clip_id in first_place:
            first_path, first_number = first_place[segment.clip_id]
            faults.append(f"{path}:{number}: the clip {segment.clip_id!r} is at {first_path}:{first_number} already")
            continue
        first_place[segment.clip_id] = path, number
        segments.append(segment)
    if faults:
        shown = "\n".join(faults[:_MOST_FAULTS_SHOWN])
        more = f"\nand {len(faults) - _MOST_FAULTS_SHOWN} more" if len(faults) > _MOST_FAULTS_SHOWN else ""
        raise ManifestError(f"{shown}{more}\nCorrect or delete these lines.")
    return segments


class _LineError(Exception):
    """What is wrong with one line."""


def _lines(csv_paths: Iterable[str | Path]) -> Iterator[tuple[str, int, str]]:
    """Give (file, number, text) for each line that isn't a comment."""
    for csv_path in csv_paths:
        with storage.open_input(csv_path) as stream:
            try:
                for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), start=1):
                    if line.strip() and not line.startswith("#"):
                        yield str(csv_path), number, line
            except UnicodeDecodeError as error:
                raise ManifestError(f"{csv_path}: is not a text file in UTF-8 ({error})") from error


def _parse_line(line: str, vocabulary: Vocabulary) -> Segment:
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
    return Segment(clip_id, start_seconds, end_seconds, _labels(mids, vocabulary))


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
