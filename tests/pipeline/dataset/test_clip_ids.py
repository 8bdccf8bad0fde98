import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.clip_ids import clip_id_of_stem, has_control_characters, is_youtube_id

youtube_ids = st.from_regex(r"[A-Za-z0-9_-]{11}", fullmatch=True)
seconds = st.integers(0, 10**6).map(str) | st.floats(0, 10**4).map("{:.3f}".format)


@given(youtube_ids, seconds, seconds)
def test_the_list_recognises_an_id_in_every_spelling(clip_id: str, start: str, end: str) -> None:
    spellings = [clip_id, f"{clip_id}_{start}", f"{clip_id}_{start}_{end}"]
    spellings += [f"Y{spelling}" for spelling in spellings]
    assert {clip_id_of_stem(spelling, {clip_id}) for spelling in spellings} == {clip_id}


@given(youtube_ids, seconds, seconds)
def test_a_youtube_id_is_recognised_without_a_list(clip_id: str, start: str, end: str) -> None:
    assert clip_id_of_stem(clip_id) == clip_id
    assert clip_id_of_stem(f"Y{clip_id}") == clip_id
    assert clip_id_of_stem(f"{clip_id}_{start}_{end}") == clip_id


@pytest.mark.parametrize("stem", ["dog", "a.b.c", "Yesterday", "with space", "clip_30_40", ""])
def test_any_other_stem_is_its_own_id(stem: str) -> None:
    assert clip_id_of_stem(stem) == stem


def test_the_list_decides_in_doubt() -> None:
    assert clip_id_of_stem("Yabcdefghijk") == "abcdefghijk"
    assert clip_id_of_stem("Yabcdefghijk", {"Yabcdefghijk"}) == "Yabcdefghijk"
    assert clip_id_of_stem("dog_30.000", {"dog"}) == "dog"
    assert clip_id_of_stem("abcdefghijk_30", {"abcdefghijk_30", "abcdefghijk"}) == "abcdefghijk_30"


def test_ids_are_case_sensitive() -> None:
    assert clip_id_of_stem("ABCDEFGHIJK", {"abcdefghijk"}) == "ABCDEFGHIJK"


def test_a_youtube_id_has_eleven_characters_of_its_alphabet() -> None:
    assert is_youtube_id("--PJHxphWEs")
    assert not is_youtube_id("--PJHxphWE")
    assert not is_youtube_id("--PJHxphWEs\n")
    assert not is_youtube_id("é-PJHxphWEs")


def test_line_breaks_and_lone_surrogates_are_control_characters() -> None:
    assert all(has_control_characters(f"a{char}b") for char in "\0\n\r\x85\u2028\ud800\x1b")
    assert not has_control_characters("naïve 音\u3000 'quoted', 100 %")
