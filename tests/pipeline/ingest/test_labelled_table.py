import csv
import io
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_copies import RealClip

from pipeline.commands.ingest_csv import IngestCsvConfig, run
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import ManifestError, PipelineError, UsageError
from pipeline.ingest.labelled_table import LabelledTableSource, TableColumns
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import PlannedClip


@pytest.fixture
def audio(tmp_path: Path, mp3s: list[RealClip]) -> Path:
    """sub/0.mp3 to sub/3.mp3."""
    for number, clip in enumerate(mp3s):
        (tmp_path / "audio" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "audio" / "sub" / f"{number}.mp3").write_bytes(clip.audio)
    return tmp_path / "audio"


def ingest(audio: Path, text: str, **settings: object):
    table = audio.parent / "labels.csv"
    table.write_text(text)
    return run(IngestCsvConfig(csv=(str(table),), audio=str(audio), out=str(audio.parent / "train"), **settings))  # pyright: ignore[reportArgumentType]


def labels(dataset: Path) -> dict[str, list[str]]:
    manifest = read_manifest(dataset)
    names = manifest.vocabulary.names
    rows = manifest.table.to_pylist()
    return {row["clip_id"]: [names[label] for label in row["labels"]] for row in rows}


def test_one_label_a_row(audio: Path, tmp_path: Path) -> None:
    ingest(audio, "fold,path,label\n1,sub/0.mp3,zebra\n2,sub/1.mp3,Ape\n3,sub/2.mp3,zebra\n")
    assert labels(tmp_path / "train") == {"sub/0": ["zebra"], "sub/1": ["Ape"], "sub/2": ["zebra"]}
    assert read_manifest(tmp_path / "train").vocabulary.names == ("Ape", "zebra")


def test_many_labels_a_field_and_columns_of_any_name(audio: Path, tmp_path: Path) -> None:
    text = 'fname\tclasses\tkey\nsub/0\ta;b\tone\nsub/1.mp3\t\ttwo\nsub/2.mp3\tb; a ;b\t"th;ree"\n'
    options = {"path_column": "fname", "label_column": "classes", "id_column": "key", "label_separator": ";"}
    ingest(audio, text, delimiter="\\t", **options)
    assert labels(tmp_path / "train") == {"one": ["a", "b"], "two": [], "th;ree": ["a", "b"]}


def test_many_rows_a_clip(audio: Path, tmp_path: Path) -> None:
    ingest(audio, "path,label\nsub/0.mp3,b\nsub/1.mp3,a\nsub/0.mp3,a\n")
    assert labels(tmp_path / "train") == {"sub/0": ["a", "b"], "sub/1": ["a"]}


def test_a_table_that_was_written_on_windows(audio: Path, tmp_path: Path) -> None:
    (audio / "sub" / "odd\\name.mp3").write_bytes((audio / "sub" / "1.mp3").read_bytes())
    ingest(audio, "path,label\nsub\\0.mp3,a\nsub/odd\\name.mp3,b\n")
    assert labels(tmp_path / "train") == {"sub/0": ["a"], "sub/odd\\name": ["b"]}


def test_only_the_rows_of_one_split(audio: Path, tmp_path: Path) -> None:
    ingest(audio, "path,label,fold\nsub/0.mp3,a,1\nsub/1.mp3,b,2\nsub/2.mp3,c,1\n", only=("fold=1",))
    assert labels(tmp_path / "train") == {"sub/0": ["a"], "sub/2": ["c"]}
    assert read_manifest(tmp_path / "train").vocabulary.names == ("a", "c")


def test_numbers_are_ordered_by_value(audio: Path, tmp_path: Path) -> None:
    ingest(audio, "path,label\nsub/0.mp3,10\nsub/1.mp3,9\n")
    assert read_manifest(tmp_path / "train").vocabulary.names == ("9", "10")


def test_what_cannot_be_used_is_listed(audio: Path, tmp_path: Path, rejected) -> None:
    own = tmp_path / "own.csv"
    own.write_text('index,mid,display_name\n0,a,"A"\n')
    text = (
        f"path,label\nsub/0.mp3,A\n,a\nsub/9.mp3,a\nsub/1.mp3,b\nsub/2.mp3,a,b\n\n{audio}/sub/3.mp3,a\n{'x' * 300},a\n"
    )
    ingest(audio, text, classes=str(own))
    assert labels(tmp_path / "train") == {"sub/0": ["A"], "sub/3": ["A"]}
    table = tmp_path / "labels.csv"
    assert rejected(tmp_path / "train") == [
        (None, f"{table}:3", "malformed row"),
        (None, f"{table}:6", "malformed row"),
        ("sub/9", "sub/9.mp3", "file missing"),
        ("sub/1", "sub/1.mp3", "unknown label"),
        ("x" * 300, "x" * 300, "file missing"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "path;label\r\nsub/0.mp3;a\r\nsub/1.mp3;b, c\r\n",
        "path\tlabel\nsub/0.mp3\ta\nsub/1.mp3\tb, c\n",
        'path,label,\nsub/0.mp3,a,\n"sub/1.mp3","b, c",,,\n,,\n',
        "sep=;\npath;label\nsub/0.mp3;a\nsub/1.mp3;b, c\n",
    ],
    ids=["semicolons", "tabs", "filled up", "sep="],
)
def test_a_table_that_a_spreadsheet_saved_says_what_it_said(
    audio: Path, tmp_path: Path, text: str, encoding: str
) -> None:
    (tmp_path / "own.csv").write_bytes(text.encode(encoding))
    source = LabelledTableSource((str(tmp_path / "own.csv"),), audio, TableColumns(path="path", label="label"))
    vocabulary = source.own_vocabulary()
    found = list(source.scan(vocabulary, Counter()))
    assert vocabulary.names == ("a", "b, c")
    assert [(item.clip_id, item.labels) for item in found if isinstance(item, PlannedClip)] == [
        ("sub/0", (0,)),
        ("sub/1", (1,)),
    ]


def test_what_a_spreadsheet_changed_is_listed_with_its_line(audio: Path, tmp_path: Path) -> None:
    text = "path,label,id\nsub/0.mp3,a,one\nsub/1.mp3,a,#NAME?\nsub/2.mp3,#N/A,three\n#NAME?,a,four\n=-sub,b,1.2E+11\n"
    (tmp_path / "own.csv").write_bytes(text.encode() + b"sub/caf\xe9.mp3,a,six\n")
    columns = TableColumns(path="path", label="label", id="id")
    source = LabelledTableSource((str(tmp_path / "own.csv"),), audio, columns)
    assert source.own_vocabulary().names == ("a",)
    items = list(source.scan(source.own_vocabulary(), Counter()))
    assert [item.clip_id for item in items if isinstance(item, PlannedClip)] == ["one"]
    told = {item.path: f"{item.reason}: {item.detail}" for item in items if isinstance(item, Rejection)}
    table = tmp_path / "own.csv"
    assert told == {
        f"{table}:3": "malformed row: '#NAME?' is no clip id but an error's name that a spreadsheet wrote over it",
        f"{table}:4": "malformed row: '#N/A' is no label but what a spreadsheet wrote over it",
        "#NAME?": f"file missing: {table}:5: perhaps an error's name that a spreadsheet wrote over it",
        f"{table}:6": "malformed row: '1.2E+11' is no clip id but a number that a spreadsheet made of it",
        f"{table}:7": "malformed row: is not in UTF-8: 'sub/caf\\udce9.mp3'",
    }


FOUR = "index,mid,display_name\n0,/m/a,a\n1,/m/b,b\n2,/m/c,c\n3,/m/d,d\n"


def test_numbers_are_places_in_the_list_that_is_named(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(FOUR)
    ingest(audio, "path,label\nsub/0.mp3,3\nsub/1.mp3,b\n", classes=str(tmp_path / "own.csv"))
    assert labels(tmp_path / "train") == {"sub/0": ["d"], "sub/1": ["b"]}


def test_vectors_need_the_list_that_is_named(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(FOUR)
    text = "path,label\nsub/0.mp3,0 0 1 0\nsub/1.mp3,1 0 0 1\nsub/2.mp3,0 1 1\n"
    with pytest.raises(
        ManifestError, match=r"labels\.csv: the column label holds vectors of zeros and ones.*--classes"
    ):
        ingest(audio, text, label_separator=" ")
    ingest(audio, text, label_separator=" ", classes=str(tmp_path / "own.csv"))
    assert labels(tmp_path / "train") == {"sub/0": ["c"], "sub/1": ["a", "d"]}


@pytest.mark.parametrize(
    ("text", "error", "complaint"),
    [
        ("path,labels\nsub/0.mp3,a\n", UsageError, "the column 'label' is not there; its columns are path, labels"),
        ("path,label,label\nsub/0.mp3,a,b\n", UsageError, "the column 'label' is twice there"),
        ("", UsageError, "its columns are none"),
        ('path,label\n"sub/0.mp3,a\n', ManifestError, r"labels\.csv:2: is no CSV"),
        ("path,label\nsub/0.mp3,a\0\n", ManifestError, "control characters"),
    ],
)
def test_a_table_that_is_none_is_an_error_that_says_where(
    audio: Path, text: str, error: type[PipelineError], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        ingest(audio, text)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"csv": ()}, "--csv needs"),
        ({"delimiter": ";;"}, "--delimiter is ';;'"),
        ({"only": ("split",)}, "--only is 'split'"),
        ({"label_separator": ""}, "--label-separator is empty"),
    ],
)
def test_settings_out_of_range_are_wrong_usage(settings: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        IngestCsvConfig(**{"csv": ("a.csv",), "audio": "audio", "out": "train"} | settings)


@given(st.binary() | st.text('path,label";\n\r\0 aé', max_size=60).map(lambda text: f"path,label\n{text}".encode()))
@example(b"path,label\n" + b'"' * 200_000)
@settings(max_examples=300)
def test_nothing_but_our_errors_come_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "junk.csv").write_bytes(junk)
    source = LabelledTableSource((str(folder / "junk.csv"),), folder, TableColumns(path="path", label="label"))
    with suppress(ManifestError, UsageError):
        vocabulary = source.own_vocabulary()
        for _ in source.scan(vocabulary, None):  # pyright: ignore[reportArgumentType]
            pass


cells = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)
texts = cells.map(str.strip).filter(bool)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.sampled_from(",;\t|"))
@settings(max_examples=200)
def test_every_row_that_is_written_comes_back_as_a_clip_with_its_labels(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("path", "label"), *rows])
    (folder / "valid.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    columns = TableColumns(path="path", label="label", delimiter=delimiter)
    source = LabelledTableSource((str(folder / "valid.csv"),), folder / "no sounds", columns)
    vocabulary = source.own_vocabulary()
    assert {label.mid for label in vocabulary.classes} == {label for _, label in rows}
    found = [(item.path, item.reason) for item in source.scan(vocabulary, Counter()) if isinstance(item, Rejection)]
    assert found == [(path, "file missing") for path in dict.fromkeys(path for path, _ in rows)]


def test_an_empty_field_is_an_unknown_label_where_that_is_said(audio: Path, tmp_path: Path) -> None:
    text = "path,label\nsub/0.mp3,b\nsub/1.mp3,\nsub/2.mp3,a\n"
    ingest(audio, text, unlabelled=True)
    assert labels(tmp_path / "train") == {"sub/0": ["b"], "sub/1": [], "sub/2": ["a"]}
    assert read_manifest(tmp_path / "train").unlabelled.tolist() == [False, True, False]
    ingest(audio, text, overwrite=True)
    assert not read_manifest(tmp_path / "train").unlabelled.any()
    with pytest.raises(UsageError, match="--unlabelled needs the class list"):
        ingest(audio, "path\nsub/0.mp3\n", unlabelled=True, overwrite=True)
    (tmp_path / "own.csv").write_text("index,mid,display_name\n0,/m/cow,cow\n")
    ingest(audio, "path\nsub/0.mp3\n", unlabelled=True, overwrite=True, classes=str(tmp_path / "own.csv"))
    assert read_manifest(tmp_path / "train").unlabelled.tolist() == [True]
