from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.clip_ids import has_control_characters
from pipeline.dataset.vocabulary import LabelClass, Vocabulary, audioset_vocabulary, read_vocabulary
from pipeline.errors import ManifestError

HEADER = "index,mid,display_name\n"
texts = st.text(min_size=1).filter(lambda text: not has_control_characters(text))


def test_audiosets_list_has_its_527_classes_and_its_own_bytes() -> None:
    vocabulary = audioset_vocabulary()
    assert len(vocabulary) == 527
    assert vocabulary.names[vocabulary.index_of("/m/09x0r")] == "Speech"
    assert vocabulary.index_by_name["Male speech, man speaking"] == 1
    published = Path(__file__).parents[3] / "manifests" / "audioset_classes.csv"
    assert vocabulary.to_csv_bytes() == published.read_bytes()
    assert read_vocabulary(published) == vocabulary


@given(st.lists(st.tuples(texts, texts), min_size=1, unique_by=lambda pair: pair[0]))
def test_any_class_list_comes_back_from_its_csv(tmp_path_factory: pytest.TempPathFactory, pairs: list) -> None:
    vocabulary = Vocabulary(tuple(LabelClass(index, mid, name) for index, (mid, name) in enumerate(pairs)))
    path = tmp_path_factory.getbasetemp() / "classes.csv"
    path.write_bytes(vocabulary.to_csv_bytes())
    again = read_vocabulary(path)
    assert again == vocabulary
    assert again.sha256 == vocabulary.sha256


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", ":1: a class list begins with"),
        ("mid,name\n/m/1,Speech\n", ":1: a class list begins with"),
        (HEADER, "holds 0 classes"),
        (HEADER + "0,/m/1\n", ":2: has 2 fields"),
        (HEADER + '0,/m/1,"a"\n2,/m/2,"b"\n', ":3: index '2', expected 1"),
        (HEADER + '0,/m/1,"a"\n1,/m/1,"b"\n', ":3: the class '/m/1' is there twice"),
        (HEADER + '0,,"a"\n', ":2: a class needs a mid"),
        (HEADER + '0,/m/1,"a\n', ":2: is not a CSV file"),
        (HEADER + "0,#NAME?,a\n", ":2: '#NAME\\?' is what a spreadsheet wrote over the class"),
    ],
)
def test_a_malformed_list_is_refused_by_line(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(content)
    with pytest.raises(ManifestError, match=complaint):
        read_vocabulary(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_list_that_a_spreadsheet_saved_is_the_same_list(
    tmp_path: Path, encoding: str, line_end: str, delimiter: str
) -> None:
    rows = [["index", "mid", "display_name", ""], ["0", "/m/1", '"Bell, small"', ""], ["1", "/m/2", "Größe", ""]]
    text = line_end.join([*map(delimiter.join, rows), delimiter * 3, ""])
    (tmp_path / "own.csv").write_bytes(text.encode(encoding))
    assert read_vocabulary(tmp_path / "own.csv").names == ("Bell, small", "Größe")


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(HEADER.encode() + b"0,/m/1,caf\xe9\n")
    with pytest.raises(ManifestError, match=r"own\.csv:2: is not in UTF-8: .*caf"):
        read_vocabulary(tmp_path / "own.csv")


@given(st.binary() | st.text('0123,"\n\r/m é', max_size=60).map(str.encode))
@settings(max_examples=300)
def test_nothing_but_a_manifest_error_comes_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.csv"
    path.write_bytes(HEADER.encode() + junk)
    with suppress(ManifestError):
        assert len(read_vocabulary(path)) > 0


def test_a_name_that_two_classes_share_names_neither() -> None:
    vocabulary = Vocabulary((LabelClass(0, "/m/1", "Bell"), LabelClass(1, "/m/2", "Bell")))
    assert vocabulary.index_by_name == {}


def test_an_unknown_class_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        audioset_vocabulary().index_of("/m/nothing")
