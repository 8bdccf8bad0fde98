from dataclasses import replace

import pytest

from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import LogitStoreError
from pipeline.logits.stamp import StoreStamp, TeacherStamp

PASST = TeacherStamp(name="passt_tiny", weight=2.0, sha256="a" * 64, front_end="mel")
AST = TeacherStamp(name="ast_tiny", weight=1.0, sha256="b" * 64, front_end="fbank")
STAMP = StoreStamp(teachers=(PASST, AST), vocabulary_sha256="c" * 64, classes=527, precision="float32")


def test_stamp_comes_back_from_its_json() -> None:
    assert StoreStamp.from_json(STAMP.to_json(), "store.json") == STAMP


def test_equal_stamps_have_no_differences() -> None:
    assert replace(STAMP).differences_from(STAMP) == ""


def test_differences_name_the_field_and_both_values() -> None:
    other = replace(STAMP, precision="bfloat16", teachers=(PASST, replace(AST, weight=3.0, sha256="d" * 64)))
    assert other.differences_from(STAMP) == (
        "precision is bfloat16, not float32; teacher 2 weight is 3.0, not 1.0; "
        "teacher 2 sha256 is dddddddddddd, not bbbbbbbbbbbb"
    )
    assert replace(STAMP, teachers=(PASST,)).differences_from(STAMP) == "1 teachers, not 2"


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", STAMP.to_json().replace(b'"classes": 527', b'"classes": "many"'), STAMP.to_json()[:-1]],
)
def test_what_is_no_stamp_is_refused_with_its_place(text: bytes) -> None:
    with pytest.raises(LogitStoreError, match=r"store\.json: its stamp can't be read"):
        StoreStamp.from_json(text, "store.json")


def test_stamp_of_an_earlier_version_equals_that_of_the_same_views_now() -> None:
    views = ViewsStamp(count=3, config=ViewConfig(seed=5, max_shift_ms=50, max_gain_db=3.0))
    now = replace(STAMP, views=views)
    earlier = now.to_json().replace(b'"max_shift_ms"', b'"most_shift_ms"').replace(b'"max_gain_db"', b'"most_gain_db"')
    assert earlier.count(b"most_") == 2
    assert StoreStamp.from_json(earlier, "store.json") == now
    assert StoreStamp.from_json(now.to_json(), "store.json") == now


def test_field_of_a_newer_version_is_refused() -> None:
    with pytest.raises(LogitStoreError, match=r"compression.*newer version"):
        StoreStamp.from_json(STAMP.to_json().replace(b'"classes"', b'"compression": 2, "classes"'), "store.json")
