import numpy as np
import pytest

from pipeline.scoring.label_fit import LabelFit, measure_fit, offsets, stretches

CLIPS, CLASSES = 60, 6


def draw(seed: int, *, sorted_labels: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels, and the logits of a middling teacher: (clips, classes) twice."""
    random = np.random.default_rng(seed)
    labels = (random.random((CLIPS, CLASSES)) < 0.3).astype(np.float32)
    if sorted_labels:
        labels = np.eye(CLASSES, dtype=np.float32)[np.sort(random.integers(CLASSES, size=CLIPS))]
    return random.normal(size=labels.shape) + 2 * labels, labels


def fit(logits: np.ndarray, labels: np.ndarray) -> LabelFit:
    rows = np.arange(len(labels))
    near = {offset: (who, labels[their]) for offset, (who, their) in offsets(rows, rows).items()}
    return measure_fit(logits, rows, labels, near)


@pytest.mark.parametrize("seed", range(8))
def test_a_middling_teacher_passes_and_the_same_shuffled_does_not(seed: int) -> None:
    logits, labels = draw(seed)
    assert fit(logits, labels).fits
    assert not fit(np.random.default_rng(seed).permutation(logits), labels).fits
    assert not fit(np.random.default_rng(seed).normal(size=labels.shape), labels).fits


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_the_offset_that_mends_a_shift_is_found(shift: int) -> None:
    logits, labels = draw(1)
    assert fit(np.roll(logits, shift, axis=0), labels).offset == -shift


@pytest.mark.parametrize("seed", range(8))
def test_clips_sorted_by_class_pass(seed: int) -> None:
    assert fit(*draw(seed, sorted_labels=True)).fits


def test_labels_that_are_all_alike_can_tell_nothing() -> None:
    logits, labels = draw(0)
    assert not fit(logits, np.ones_like(labels)).fits


def test_offsets_know_only_neighbours_that_are_clips_of_the_dataset() -> None:
    clip_of_row = np.array([7, -1, 5, 6])
    found = {
        offset: (who.tolist(), clips.tolist())
        for offset, (who, clips) in offsets(np.array([0, 2, 3]), clip_of_row).items()
    }
    assert found == {-2: ([1], [7]), -1: ([2], [5]), 1: ([1], [6]), 2: ([0], [5])}


def test_large_samples_are_judged_in_stretches_and_small_ones_whole() -> None:
    assert [len(piece) for piece in stretches(np.arange(8000))] == [1000] * 8
    assert [len(piece) for piece in stretches(np.arange(1200))] == [600] * 2
    assert [len(piece) for piece in stretches(np.arange(3))] == [3]
