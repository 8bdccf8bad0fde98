from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import teacher

FAMILIES = ["passt_tiny", "ast_tiny", "ced_tiny"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, **settings: int) -> teacher.AudioTransformer:
    torch.manual_seed(0)
    square = {"patch": 16, "stride": 16, "whole_band": False}
    small: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, **square, **settings}
    return teacher.create_model(name, num_classes=5, **small)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_family
def test_waveforms_become_logits(name: str, clips: Callable[..., Tensor]) -> None:
    model = build(name).eval()
    assert (model.model_name, model.input_seconds) == (name, 10.0)
    logits = model(model.front_end(clips(model.sample_rate_hz)))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


@every_family
def test_every_parameter_receives_a_gradient(name: str, clips: Callable[..., Tensor]) -> None:
    model = build(name).train()
    model(model.front_end(clips(model.sample_rate_hz))).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@every_family
def test_patchout_works_in_training_mode_alone_and_follows_the_generator(
    name: str, clips: Callable[..., Tensor]
) -> None:
    whole, dropping = build(name), build(name, s_patchout_t=20, s_patchout_f=1, u_patchout=5)
    features = whole.eval().front_end(clips(whole.sample_rate_hz))
    assert torch.equal(dropping.eval()(features), whole(features))

    dropping.train()
    answers = [dropping(features, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    shorter = dropping.forward_features(features, seeded(0)).shape[1]
    rows, columns = {"passt_tiny": (8, 62), "ast_tiny": (8, 64), "ced_tiny": (4, 62)}[name]
    tokens = 0 if name == "ced_tiny" else 2
    assert shorter == tokens + (rows - 1) * (columns - 20) - 5


@every_family
def test_whole_band_patches_hold_every_band_at_their_time(name: str, clips: Callable[..., Tensor]) -> None:
    model = build(name, whole_band=True, patch=8, stride=8).eval()
    features = model.front_end(clips(model.sample_rate_hz))
    assert model.patch_embed.proj.weight.shape == (32, 1, model.config.mels, 8)
    patches = {"passt_tiny": 125, "ast_tiny": 128, "ced_tiny": 125}[name]
    assert model.forward_features(features).shape[1] == patches + (0 if name == "ced_tiny" else 2)


@every_family
def test_bfloat16_changes_logits_little_and_returns_float32(name: str, clips: Callable[..., Tensor]) -> None:
    model = build(name).eval()
    features = model.front_end(clips(model.sample_rate_hz))
    exact = model(features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(features)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)
    assert not torch.equal(rounded, exact)


@every_family
def test_tokens_and_position_encodings_are_spared_weight_decay(name: str) -> None:
    spared = build(name).no_weight_decay()
    assert all("pos_embed" in key or "token" in key for key in spared)
    assert len(spared) == {"passt_tiny": 5, "ast_tiny": 3, "ced_tiny": 2}[name]


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny"])
def test_the_teachers_for_machines_without_a_gpu_are_small(name: str) -> None:
    parameters = sum(parameter.numel() for parameter in teacher.create_model(name).parameters())
    assert parameters < 3e6  # both, as float16, within the 12 MB that the sample may take


def test_fresh_weights_are_deits() -> None:
    weights = build("passt_tiny", embed_dim=128).state_dict()
    for key in ("blocks.0.attn.qkv.weight", "head.1.weight", "time_new_pos_embed"):
        assert weights[key].std().item() == pytest.approx(0.02, rel=0.06)
    assert not weights["blocks.0.mlp.fc1.bias"].any()


def test_a_seed_gives_the_same_fresh_weights() -> None:
    first, second = build("ast_tiny").state_dict(), build("ast_tiny").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_classifier_can_be_replaced() -> None:
    model = build("ced_tiny")
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model(torch.zeros(1, 64, 100)).shape == (1, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth is 0; choose 1 or more"),
        ({"s_patchout_t": -1}, "s_patchout_t is -1; choose 0 or more"),
        ({"num_heads": 3}, "3 heads do not divide embed_dim 32"),
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("passt_tiny", **settings)
