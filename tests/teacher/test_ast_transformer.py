from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import teacher
from teacher.ast_transformer import AST

CARDS = [teacher.model_card(name) for name in teacher.model_names()]
# Upstream's patches are square, so upstream has no like of the tiny model.
REGISTERED = [card.name for card in CARDS if card.network is AST and not card.config.whole_band]
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def official(read_golden: Callable):
    return read_golden("ast_10_10_official")


@pytest.fixture(scope="module")
def hugging_face(read_golden: Callable):
    return read_golden("ast_10_10_hf")


@pytest.fixture(scope="module")
def official_model(official) -> Iterator[teacher.AudioTransformer]:
    with torch.inference_mode():
        yield teacher.create_model("ast_base_p16_s10", official.weights).eval()


@pytest.fixture(scope="module")
def hugging_face_model(hugging_face) -> Iterator[teacher.AudioTransformer]:
    with torch.inference_mode():
        yield teacher.create_model("ast_base_p16_s10_hf", hugging_face.weights).eval()


@pytest.mark.parametrize("duration", ["10s", "4s3"])
def test_ast_answers_as_the_original_project(official, official_model, duration: str) -> None:
    official.assert_answers(official_model, "fbank", duration)


@pytest.mark.parametrize("duration", ["10s", "4s3"])
def test_ast_answers_as_hugging_faces_version(hugging_face, hugging_face_model, duration: str) -> None:
    hugging_face.assert_answers(hugging_face_model, "fbank", duration)


def test_original_weights_in_hugging_faces_version_answer_as_theirs(official, official_model, hugging_face) -> None:
    expected = torch.from_numpy(hugging_face.arrays["logits_10s_official_weights"][:1])
    model = teacher.create_model("ast_base_p16_s10_hf", official.weights).eval()
    with torch.inference_mode():
        logits = model(official_model.front_end(official.clips("10s")[:1]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_ast_equals_transformers_with_its_present_key_names(
    name: str, clips: Callable[..., Tensor], fill_module: Callable
) -> None:
    transformers = pytest.importorskip("transformers")
    stride = teacher.model_card(name).config.stride
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        frequency_stride=stride,
        time_stride=stride,
        num_labels=7,
    )
    theirs = transformers.ASTForAudioClassification(config).eval()
    fill_module(theirs)
    same_epsilon: dict[str, Any] = {"norm_eps": 1e-12, "head_norm_eps": 1e-12}
    ours = teacher.create_model(name, theirs.state_dict(), **SMALL, **same_epsilon).eval()
    with torch.inference_mode():
        features = ours.front_end(clips(16000, 3.0))
        torch.testing.assert_close(ours(features), theirs(features).logits, rtol=0, atol=2e-5)


def test_other_features_than_its_front_ends_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 128, 1000\).*ast_tiny takes \(batch, 1024 frames, 128 mels\)"):
        teacher.create_model("ast_tiny")(torch.zeros(1, 128, 1000))
