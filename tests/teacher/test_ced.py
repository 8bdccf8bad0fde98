from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import teacher
from teacher.ced import logit_of_mean_probability


@pytest.fixture(scope="module")
def golden(read_golden: Callable):
    return read_golden("ced_tiny")


@pytest.fixture(scope="module")
def model(golden) -> teacher.AudioTransformer:
    return teacher.create_model("ced_tiny", golden.weights).eval()


@pytest.mark.parametrize("duration", ["10s", "4s3"])
def test_ced_answers_as_upstream(golden, model, duration: str) -> None:
    with torch.inference_mode():
        golden.assert_answers(model, "logmel", duration)


def test_long_clips_give_upstreams_mean_probability_over_pieces(golden, model) -> None:
    with torch.inference_mode():
        logits = model(model.front_end(golden.clips("25s")))
    golden.assert_close(logits.sigmoid(), "probabilities_25s")


def test_a_clip_of_whole_pieces_keeps_its_last_piece(model) -> None:
    features = torch.randn(1, 64, 2 * 1012, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pieces = torch.stack([model(piece) for piece in features.split(1012, dim=2)])
        torch.testing.assert_close(model(features), logit_of_mean_probability(pieces), rtol=0, atol=2e-5)


def test_mean_of_certain_probabilities_stays_finite() -> None:
    logits = torch.tensor([[[-200.0, 200.0, 1.0]], [[-200.0, 200.0, 1.0]]])
    torch.testing.assert_close(logit_of_mean_probability(logits), torch.tensor([[-200.0, 200.0, 1.0]]))


def test_training_adapts_the_normalisation_of_the_bands(clips: Callable[..., Tensor]) -> None:
    model = teacher.create_model("ced_tiny", num_classes=3, depth=1)
    model(model.front_end(clips(16000, 1.0)))
    assert model.state_dict()["init_bn.running_mean"].all()
