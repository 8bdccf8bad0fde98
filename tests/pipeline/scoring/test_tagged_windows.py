import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.scoring.tagged_windows import COLUMNS, Format, TaggedWindow, choose_format, open_writer

WINDOWS = (
    TaggedWindow(file="a, b.wav", start_seconds=0, end_seconds=1.5, tags=(("Speech, male", 0.9), ('"Dog"', 0.25))),
    TaggedWindow(file="a, b.wav", start_seconds=1.5, end_seconds=2.0004, tags=()),
    TaggedWindow(file="a, b.wav", start_seconds=2, end_seconds=3, tags=(("Tab\tand\nline", 0.123456),)),
)
ROWS = [
    ("a, b.wav", 0.0, 1.5, "Speech, male", 0.9),
    ("a, b.wav", 0.0, 1.5, '"Dog"', 0.25),
    ("a, b.wav", 2.0, 3.0, "Tab\tand\nline", 0.1235),
]


def write(form: Format, out: Path, *, several: bool = False) -> None:
    with open_writer(form, str(out), several=several) as writer:
        for window in WINDOWS:
            writer.write(window)
        writer.end_file()
        if several:
            writer.write(TaggedWindow(file="other/a, b.wav", start_seconds=0, end_seconds=1, tags=(("Dog", 1.0),)))
            writer.end_file()


def test_json_lines_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        write(choose_format(None, name), tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    head, *rows = csv.reader(io.StringIO((tmp_path / "t.csv").read_text()))
    table = pq.read_table(tmp_path / "t.parquet")
    assert tuple(head) == tuple(table.column_names) == COLUMNS
    assert [tuple(line.values()) for line in lines] == ROWS
    assert [(row[0], float(row[1]), float(row[2]), row[3], float(row[4])) for row in rows] == ROWS
    assert [tuple(row.values()) for row in table.to_pylist()] == ROWS


def read_labels(text: str) -> list[tuple[float, float, str]]:
    """Read labels by the rules of Audacity's importer (LabelTrack.cpp, Audacity 3): a line is split at runs of tabs;
    the first token has to be a number with a point, the second is the end if it is a number; the next is the text.
    Lines that begin with a backslash belong to the label before."""
    labels = []
    for line in text.splitlines():
        tokens = [token for token in line.split("\t") if token]
        assert not line.startswith("\\")
        start, end, title = tokens
        labels.append((float(start), float(end), title))
    return labels


def test_audacity_reads_its_labels(tmp_path: Path) -> None:
    write(choose_format(None, "labels.txt"), tmp_path / "labels.txt")
    assert read_labels((tmp_path / "labels.txt").read_text()) == [
        (0, 1.5, "Speech, male"),
        (0, 1.5, '"Dog"'),
        (2, 3, "Tab and line"),
    ]


def test_labels_of_several_sounds_go_into_a_folder_under_names_of_their_own(tmp_path: Path) -> None:
    write("audacity", tmp_path / "labels", several=True)
    found = {path.name: len(read_labels(path.read_text())) for path in (tmp_path / "labels").iterdir()}
    assert found == {"a, b.wav.txt": 3, "a, b.wav (2).txt": 1}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(form: Format) -> None:
        with open_writer(form, str(tmp_path / "out")) as writer:
            writer.write(WINDOWS[0])
            raise RuntimeError

    forms: tuple[Format, ...] = ("csv", "jsonl", "parquet", "audacity")
    for form in forms:
        with pytest.raises(RuntimeError):
            fail(form)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_format_or_no_place_is_refused() -> None:
    assert choose_format(None, None) == "table"
    assert choose_format("csv", "tags.txt") == "csv"
    with pytest.raises(UsageError, match="does not say the format"):
        choose_format(None, "tags")
    with pytest.raises(UsageError, match=r"--out tags\.parquet"):
        choose_format("parquet", None)
    with pytest.raises(UsageError, match="standard output"):
        choose_format("table", "t.csv")
