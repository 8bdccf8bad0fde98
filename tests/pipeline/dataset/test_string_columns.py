import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.string_columns import repeated_rows, string_bytes, string_lengths

texts = st.lists(st.text(max_size=20) | st.sampled_from(["", "a", "aa", "b"]), max_size=30)


@given(texts, st.integers(0, 5))
def test_rows_are_repeated_where_an_earlier_row_is_equal(strings: list[str], skipped: int) -> None:
    column = pa.array(strings, pa.string())[skipped:]
    strings = strings[skipped:]
    assert repeated_rows(column).tolist() == [row for row, text in enumerate(strings) if text in strings[:row]]
    assert string_lengths(column).tolist() == [len(text.encode()) for text in strings]


@given(texts, texts)
def test_two_lists_share_a_spelling_only_when_they_are_equal(one: list[str], two: list[str]) -> None:
    spellings = [string_bytes(pa.array(strings, pa.string())) for strings in (one, two)]
    assert (spellings[0] == spellings[1]) == (one == two)


def test_a_slice_is_spelled_like_a_copy() -> None:
    whole = pa.array(["x", "", "long one", "y"])
    assert string_bytes(whole[1:3]) == string_bytes(pa.array(["", "long one"]))


def test_spelling_stays_what_digests_in_stores_were_made_of() -> None:
    assert string_bytes(pa.array(["ab", "", "c"])) == b"".join(n.to_bytes(8, "little") for n in (2, 0, 1)) + b"abc"
    assert string_bytes(pa.array([], pa.string())) == b""
