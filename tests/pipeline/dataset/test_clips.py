import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.clips import from_shard_key, to_shard_key

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(ids)
def test_every_id_comes_back_from_its_key(clip_id: str) -> None:
    assert from_shard_key(to_shard_key(clip_id)) == clip_id


@given(ids)
def test_a_key_has_nothing_that_webdataset_or_a_tar_would_split_at(clip_id: str) -> None:
    key = to_shard_key(clip_id)
    assert not set(key) & set("./\\")
    assert key.isprintable()
    assert " " not in key


@pytest.mark.parametrize("clip_id", ["--PJHxphWEs", "_abcdefghij", "dog's-bark", "音"])
def test_ordinary_ids_are_their_own_keys(clip_id: str) -> None:
    assert to_shard_key(clip_id) == clip_id


def test_an_empty_id_has_no_key() -> None:
    with pytest.raises(ValueError, match="empty"):
        to_shard_key("")
