import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.manifest import SCHEMA, Manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.ingest.splitting import Side, Split, hash_numbers

CLASSES = 12


def manifest_of(labels_of_ids: dict[str, list[int]]) -> Manifest:
    rows = [
        {"clip_id": clip_id, "shard": "a.tar", "offset": 0, "size": 1, "format": "wav", "labels": labels}
        for clip_id, labels in labels_of_ids.items()
    ]
    vocabulary = Vocabulary(tuple(LabelClass(index, f"/m/{index}", str(index)) for index in range(CLASSES)))
    return Manifest("d", pa.Table.from_pylist(rows, schema=SCHEMA), vocabulary)


def in_eval(split: Split, labels_of_ids: dict[str, list[int]]) -> set[str]:
    manifest = manifest_of(labels_of_ids)
    return {clip_id for clip_id, there in zip(labels_of_ids, split.of_eval(manifest).tolist(), strict=True) if there}


@pytest.fixture(scope="module")
def long_tail() -> dict[str, list[int]]:
    """3000 clips; class c is on a share of 0.5 ** c of them, the last class on one or two clips."""
    random = np.random.default_rng(0)
    carried = random.random((3000, CLASSES)) < 0.5 ** np.arange(CLASSES)
    return {f"clip {row}": np.flatnonzero(carried[row]).tolist() for row in range(len(carried))}


clips = st.dictionaries(
    st.text(min_size=1, max_size=6), st.lists(st.integers(0, CLASSES - 1), unique=True), max_size=30
)


@given(clips, clips, st.floats(0.05, 0.95), st.integers(0, 3))
def test_a_clips_side_does_not_depend_on_what_else_is_there(
    some: dict[str, list[int]], more: dict[str, list[int]], share: float, seed: int
) -> None:
    split = Split(eval_share=share, seed=seed)
    assert in_eval(split, some) == in_eval(split, more | some) & some.keys()


@given(clips, st.floats(0.05, 0.95), st.booleans())
def test_a_clips_side_does_not_depend_on_the_order(some: dict[str, list[int]], share: float, stratify: bool) -> None:
    split = Split(eval_share=share, stratify=stratify)
    assert in_eval(split, some) == in_eval(split, dict(reversed(some.items())))


def test_the_two_sides_are_the_whole() -> None:
    manifest = manifest_of({f"{number}": [] for number in range(50)})
    split = Split(eval_share=0.4)
    assert (Side(split, True)(manifest) ^ Side(split, False)(manifest)).all()


def test_a_larger_share_only_adds_and_another_seed_divides_otherwise(long_tail: dict[str, list[int]]) -> None:
    small, large = (in_eval(Split(eval_share=share), long_tail) for share in (0.1, 0.2))
    assert small < large
    assert in_eval(Split(eval_share=0.1, seed=1), long_tail) != small


def test_numbers_are_the_same_on_every_machine_and_even() -> None:
    # The first eight bytes of SHA-256 of "0 --PJHxphWEs", without the last eleven bits.
    assert hash_numbers(["--PJHxphWEs"], 0).tolist() == [0.5037692912496504]
    numbers = hash_numbers([f"{number}" for number in range(20_000)], 0)
    counts, _ = np.histogram(numbers, 10, (0, 1))
    assert abs(counts - 2000).max() < 5 * 2000**0.5


def test_stratified_sides_have_each_class_in_its_share(long_tail: dict[str, list[int]]) -> None:
    manifest = manifest_of(long_tail)
    counts = manifest.label_counts()
    for share in (0.1, 0.35):
        found = manifest.label_counts(np.flatnonzero(Split(eval_share=share, stratify=True).of_eval(manifest)))
        assert (abs(found - share * counts) <= np.maximum(1, 0.02 * counts)).all()
        assert (found[counts > 1] > 0).all()
        assert (found[counts > 1] < counts[counts > 1]).all()
    by_hash = manifest.label_counts(np.flatnonzero(Split(eval_share=0.1).of_eval(manifest)))
    assert (by_hash[counts > 1] == 0).any()  # which is what stratifying is for


def test_new_clips_move_few_of_a_stratified_split(long_tail: dict[str, list[int]]) -> None:
    split = Split(eval_share=0.1, stratify=True)
    some = dict(list(long_tail.items())[:2700])
    moved = in_eval(split, some) ^ (in_eval(split, long_tail) & some.keys())
    assert len(moved) < 0.02 * len(some)


@pytest.mark.parametrize("stratify", [False, True])
def test_an_empty_dataset_has_two_empty_sides(stratify: bool) -> None:
    assert not in_eval(Split(eval_share=0.5, stratify=stratify), {})
