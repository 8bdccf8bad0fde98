import pytest
import torch

from teacher import ensemble_logits

FIRST = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SECOND = torch.tensor([[5.0, 0.0], [-1.0, 4.0]])


def test_weights_count_by_their_ratio() -> None:
    expected = 0.75 * FIRST + 0.25 * SECOND
    torch.testing.assert_close(ensemble_logits([FIRST, SECOND], [3, 1]), expected)
    torch.testing.assert_close(ensemble_logits([FIRST, SECOND], [0.3, 0.1]), expected)


def test_one_teacher_is_its_own_ensemble() -> None:
    assert torch.equal(ensemble_logits([FIRST], [7.0]), FIRST)


def test_half_precision_members_are_averaged_in_float32() -> None:
    averaged = ensemble_logits([FIRST.bfloat16(), SECOND.half()], [1, 1])
    assert averaged.dtype == torch.float32
    torch.testing.assert_close(averaged, (FIRST + SECOND) / 2)


@pytest.mark.parametrize(
    ("logits", "weights", "message"),
    [
        ([], [], "at least one teacher"),
        ([FIRST], [1.0, 2.0], "1 teachers, but 2 weights"),
        ([FIRST, SECOND[:, :1]], [1.0, 1.0], r"teacher 2 gives logits of shape \(2, 1\)"),
        ([FIRST, SECOND], [1.0, 0.0], "teacher 2 has weight 0.0"),
        ([FIRST, SECOND], [float("nan"), 1.0], "teacher 1 has weight nan"),
    ],
)
def test_what_cannot_be_averaged_is_refused(logits: list, weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble_logits(logits, weights)
