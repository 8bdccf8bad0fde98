import csv
import io
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.dataset.segments import read_segment_files
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.errors import ManifestError, PipelineError

HEAD = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=2, num_segs=2, num_unique_labels=2, num_positive_labels=3
# YTID, start_seconds, end_seconds, positive_labels
"""
GOOD = '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n_0abcdefghi, 0.000, 2.361, "/m/09x0r"\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def read(*paths: Path) -> pa.Table:
    return read_segment_files(paths, audioset_vocabulary())


def test_the_official_format_is_read_exactly(tmp_path: Path) -> None:
    vocabulary = audioset_vocabulary()
    segments = read(write(tmp_path / "eval.csv", HEAD + GOOD)).to_pylist()
    labels = sorted((vocabulary.index_of("/m/09x0r"), vocabulary.index_of("/t/dd00088")))
    assert segments == [
        {"clip_id": "--PJHxphWEs", "start_seconds": 30.0, "end_seconds": 40.0, "labels": labels},
        {"clip_id": "_0abcdefghi", "start_seconds": 0.0, "end_seconds": 2.361, "labels": [0]},
    ]


def test_real_lists_are_read_whole(sounds_dir: Path) -> None:
    train = read(sounds_dir / "balanced_train_segments.csv")
    assert len(train) == 896
    assert sum(map(len, train["labels"].to_pylist())) == 2073
    assert any(clip_id.startswith("-") for clip_id in train["clip_id"].to_pylist())
    both = [sounds_dir / "balanced_train_segments.csv", sounds_dir / "eval_segments.csv"]
    assert len(read(*both)) == 896 + 245


def test_windows_line_ends_and_a_byte_order_mark_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + GOOD).replace("\n", "\r\n").encode())
    assert len(read(path)) == 2


PAIR = [("AAAAAAAAAA0", 30.5, 40.0, [0, 137]), ("--PJHxphWEs", 0.0, 10.0, [0])]


@pytest.mark.parametrize(
    "text",
    [
        'AAAAAAAAAA0;30,5;40;"/m/09x0r,/m/04rlf"\r\n--PJHxphWEs;0;10;/m/09x0r\r\n',
        "sep=;\nAAAAAAAAAA0;30.5;40;/m/09x0r,/m/04rlf\n--PJHxphWEs;0;10;/m/09x0r\n",
        "AAAAAAAAAA0\t30.5\t40\t/m/09x0r,/m/04rlf\n--PJHxphWEs\t0\t10\t/m/09x0r\n",
        'AAAAAAAAAA0,30.5,40," ""/m/09x0r","/m/04rlf"""\n--PJHxphWEs,0,10," ""/m/09x0r""",\n,,,,\n',
        '"AAAAAAAAAA0, 30.5, 40, ""/m/09x0r,/m/04rlf"""\n"--PJHxphWEs, 0, 10, ""/m/09x0r"""\n',
        'AAAAAAAAAA0,30.5,40,"/m/09x0r,/m/04rlf"\r--PJHxphWEs,0,10,"/m/09x0r"\r',
        f'{HEAD}AAAAAAAAAA0,30.5,40,"/m/09x0r,/m/04rlf"\n\ufeff{HEAD}--PJHxphWEs,0,10,"/m/09x0r"\n',
        'YTID,start_seconds,end_seconds,positive_labels\nAAAAAAAAAA0,30.5,40,"/m/09x0r,/m/04rlf"\n--PJHxphWEs,0,10,/m/09x0r\n',
        '# my own list\n#\nAAAAAAAAAA0,30.5,40,"/m/09x0r,/m/04rlf"\n--PJHxphWEs,0,10,/m/09x0r\n',
    ],
    ids=["semicolons", "sep=", "tabs", "split labels", "quoted lines", "CR", "joined lists", "plain head", "own head"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_that_a_spreadsheet_saved_says_what_it_said(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "own.csv").write_bytes(text.encode(encoding))
    assert [tuple(row.values()) for row in read(tmp_path / "own.csv").to_pylist()] == PAIR


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('#NAME?,30,40,"/m/09x0r"', "'#NAME\\?' is no clip id but an error's name that a spreadsheet wrote over it"),
        ('"#NAME?";30;40;/m/09x0r', "'#NAME\\?' is no clip id"),
        ("#NAME?,,,", "'#NAME\\?' is no clip id"),
        ('=-BBBBBBBBBB,30,40,"/m/09x0r"', "'=-BBBBBBBBBB' is no clip id but a formula"),
        ("1.23E+11,30,40,/m/09x0r", "'1.23E\\+11' is no clip id but a number"),
        ("#AAAAAAAAAA1,30,40,/m/09x0r", "begins with #, but only the head of a list has comments"),
        ("# AAAAAAAAAA1, 30, 40, /m/09x0r", "begins with #"),
        ("YTID-abcdef,30,40,/m/none", "the class '/m/none'"),
    ],
)
@pytest.mark.parametrize("lines_before", [0, 3, 5])
def test_a_line_of_a_clip_is_no_comment_wherever_it_stands(
    tmp_path: Path, line: str, complaint: str, lines_before: int
) -> None:
    before = "".join((HEAD + GOOD).splitlines(keepends=True)[:lines_before])
    path = write(tmp_path / "eval.csv", f"{before}{line}\nAAAAAAAAAA0,30,40,/m/09x0r\n")
    with pytest.raises(ManifestError, match=rf"eval\.csv:{lines_before + 1}: .*{complaint}"):
        read(path)


def test_an_id_that_is_called_like_the_heads_column_is_a_clip(tmp_path: Path) -> None:
    assert read(write(tmp_path / "own.csv", "YTID-abcdef,30,40,/m/09x0r\n"))["clip_id"].to_pylist() == ["YTID-abcdef"]


def test_a_comment_among_the_clips_is_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"eval\.csv:3: begins with #"):
        read(write(tmp_path / "eval.csv", GOOD + "# the end\n"))


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"AAAAAAAAAA0,30,40,/m/09x0r\ncaf\xe9,30,40,/m/09x0r\n")
    with pytest.raises(ManifestError, match=r"own\.csv:2: is not in UTF-8"):
        read(tmp_path / "own.csv")


def test_an_empty_last_field_is_a_clip_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", 'clip, 0, 10, ""\n')
    assert read(path)["labels"].to_pylist() == [[]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('a, 0.0, 10.0, "/m/none"', "the class '/m/none' is not among the 527"),
        ('a, 10.0, 10.0, "/m/09x0r"', "the times 10.0, 10.0 are impossible"),
        ('a, -1.0, 10.0, "/m/09x0r"', "the times -1.0, 10.0 are impossible"),
        ('a, nan, 10.0, "/m/09x0r"', "'nan' is no time"),
        ('a, 0, inf, "/m/09x0r"', "'inf' is no time"),
        ('a, zero, 10.0, "/m/09x0r"', "'zero' is no time"),
        ("a, 0.0, 10.0, /m/09x0r,/m/04rlf", "has 5 fields"),
        ("a, 0.0", "has 2 fields"),
        (', 0.0, 10.0, "/m/09x0r"', "'' is no clip id"),
        ('a, 0.0, 10.0, "/m/09x0r', "not CSV"),
        ('_0abcdefghi, 0.0, 10.0, "/m/09x0r"', r"'_0abcdefghi' is at .*eval.csv:5 already"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "eval.csv", HEAD + GOOD + line + "\n")
    with pytest.raises(ManifestError, match=rf"eval\.csv:6: .*{complaint}"):
        read(path)


def test_the_first_few_of_many_bad_lines_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "eval.csv", "".join(f"{number}, 1, 0, /m/09x0r\n" for number in range(8)))
    with pytest.raises(ManifestError, match=r"(?s):1: .*:5: .*and 3 more") as raised:
        read(path)
    assert ":6:" not in str(raised.value)


def test_a_clip_in_two_lists_is_named_with_both(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one.csv", GOOD), write(tmp_path / "two.csv", HEAD + GOOD)
    with pytest.raises(ManifestError, match=r"two\.csv:4: .*one\.csv:1 already"):
        read(first, second)


def test_a_missing_list_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"absent\.csv: no such file"):
        read(tmp_path / "absent.csv")


@given(st.binary() | st.text().map(str.encode) | st.text('",\n\r# \0aé09./m', max_size=60).map(str.encode))
@example(b'"' * 200_000)
@example(b"a,0,1,\0\n")
@settings(max_examples=300)
def test_nothing_but_a_manifest_error_comes_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk_segments.csv"
    path.write_bytes(junk)
    with suppress(ManifestError):
        read(path)


ids = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="#"), min_size=1).map(
    str.strip
)
segments = st.tuples(
    ids.filter(bool),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
    st.lists(st.integers(0, 526), unique=True, max_size=4),
)


@given(st.lists(segments, max_size=8, unique_by=lambda segment: segment[0]))
@settings(max_examples=100)
def test_whatever_is_written_as_the_format_says_comes_back(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, int, int, list[int]]]
) -> None:
    mids = [label.mid for label in audioset_vocabulary().classes]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for clip_id, start, length, labels in wanted:
        writer.writerow([clip_id, start / 1000, (start + length) / 1000, ",".join(mids[label] for label in labels)])
    path = tmp_path_factory.getbasetemp() / "valid_segments.csv"
    path.write_text(HEAD + text.getvalue(), encoding="utf-8")
    found = [tuple(row.values()) for row in read(path).to_pylist()]
    assert found == [
        (clip_id, start / 1000, (start + length) / 1000, sorted(labels)) for clip_id, start, length, labels in wanted
    ]
