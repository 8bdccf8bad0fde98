import pyarrow as pa

from pipeline.logits.imports.matching import match_rows


def test_a_row_is_found_by_its_clips_id_or_by_a_spelling_of_it() -> None:
    names = pa.array(["b", None, "Y--PJHxphWEs.mp3", "a.wav", "nobody"])
    rows = match_rows(names, pa.array(["a", "b", "--PJHxphWEs"]), averaged=False)
    assert rows.clip_of_row.tolist() == [1, -1, 2, 0, -1]


def test_a_name_that_is_no_text_is_nobodys() -> None:
    names = pa.array([b"caf\xe9.wav", b"a.wav"], pa.binary()).view(pa.string())
    assert match_rows(names, pa.array(["a"]), averaged=False).clip_of_row.tolist() == [-1, 0]
