import numpy as np
import pytest

from pipeline.logits.forms import largest, mean_of_members


def probs(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_largest_come_first_and_equal_ones_by_class_number() -> None:
    top = largest(np.array([[-3, 2, -1, 2, 5]], np.float16), 3)
    assert top.classes.tolist() == [[4, 1, 3]]
    assert top.logits.tolist() == [[5.0, 2.0, 2.0]]
    assert (top.classes.dtype, top.logits.dtype, top.rest.dtype) == (np.int16, np.float16, np.float16)


def test_rest_keeps_the_probability_that_the_classes_left_out_have_together() -> None:
    logits = np.random.default_rng(0).normal(-6, 2, (50, 100)).astype(np.float16)
    top = largest(logits, 10)
    for row, rest in enumerate(top.rest):
        left_out = np.delete(logits[row], top.classes[row])
        assert 90 * probs(rest) == pytest.approx(probs(left_out).sum(), rel=3e-3)
        assert left_out.min() <= rest <= top.logits[row].min(), "no class left out is likelier than one kept"


@pytest.mark.parametrize("value", [-60_000.0, -800.0, 0.0, 800.0, 60_000.0])
def test_rest_of_equal_logits_is_that_logit(value: float) -> None:
    assert largest(np.full((1, 6), value, np.float16), 2).rest.tolist() == [np.float16(value)]


def test_rest_asks_a_student_that_treats_it_alike_what_the_whole_logits_ask() -> None:
    """Binary cross entropy is linear in its target, so its gradient by a shared logit is the summed difference."""
    logits = np.random.default_rng(1).normal(-5, 2, (1, 40)).astype(np.float16)
    top = largest(logits, 8)
    target = np.delete(probs(logits)[0], top.classes[0])
    student = probs(np.array(-4.0))
    assert (student - probs(top.rest)).item() * 32 == pytest.approx((student - target).sum(), rel=5e-3)


def test_mean_of_members_is_weighed_and_rounded_once() -> None:
    members = np.array([[[1.0, -8.0]], [[4.0, -2.0]]], np.float16)  # (teachers, rows, classes)
    mean = mean_of_members(members, [2.0, 1.0])
    assert mean.dtype == np.float16
    assert mean.tolist() == [[2.0, -6.0]]
    assert mean_of_members(members, [0.0, 3.0]).tolist() == [[4.0, -2.0]]
