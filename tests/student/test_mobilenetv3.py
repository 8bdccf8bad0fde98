"""MN equals EfficientAT's network, and its variants do what their names say."""

import numpy as np
import pytest
import torch

from student.mobilenetv3 import MobileNetV3, block_configs
from student.registry import create_model


@pytest.mark.parametrize(("golden", "name"), [("mn04", "mn04"), ("mn10", "mn10_as"), ("mn10_fc", "mn10_as_fc")])
def test_waveforms_give_the_reference_logits_and_embeddings(
    golden_dir, golden_weights, golden_config, fill, golden, name, device
) -> None:
    expected = np.load(golden_dir / f"{golden}.npz")
    bound = 1e-4 * golden_config(golden)["checks"]["logit_std"]
    weights = golden_weights(golden)
    model = create_model(name, weights).eval()
    assert list(model.state_dict()) == list(weights)
    model.to(device)
    for seconds, suffix in ((10, "10s"), (4.3, "4s3")):
        clips = len(expected[f"logits_{suffix}"])
        sounds = torch.stack([torch.from_numpy(fill.waveform(seconds, 32_000, seed)) for seed in range(clips)])
        with torch.no_grad():
            features = model.front_end(sounds.to(device))
            logits, embedding = model(features).cpu(), model.embed(features).cpu()
        np.testing.assert_allclose(logits, expected[f"logits_{suffix}"], atol=bound, rtol=0)
        np.testing.assert_allclose(embedding, expected[f"embedding_{suffix}"], atol=1e-4, rtol=1e-4)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 1, 64, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "variant",
    [
        {"se_dims": "none"},
        {"se_dims": "f"},
        {"se_dims": "t"},
        {"se_dims": "cft", "se_agg": "add"},
        {"se_dims": "cf", "se_agg": "min", "se_r": 2},
        {"dilated": True},
        {"dilated": True, "se_dims": "ft", "se_agg": "avg"},
        {"reduced_tail": True},
        {"strides": (2, 1, 2, 1)},
        {"head_type": "fully_convolutional"},
        {"head_type": "multihead_attention_pooling", "multihead_attention_heads": 3},
        {"n_mels": 64, "width_mult": 0.37},
    ],
)
def test_every_variant_tags_and_learns(images, variant) -> None:
    settings = {"width_mult": 0.2, "n_mels": 64, "input_dim_t": 100, **variant}
    model = MobileNetV3(5, **settings)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_one_clip_keeps_its_batch_axis() -> None:
    model = MobileNetV3(5, width_mult=0.1).eval()
    assert model(torch.randn(1, 1, 128, 64)).shape == (1, 5)
    assert model.embed(torch.randn(1, 1, 128, 64)).shape == (1, model.num_features)


def test_strides_and_dilation_set_the_size_of_the_last_maps() -> None:
    image = torch.randn(1, 1, 128, 256)
    networks = (
        (MobileNetV3(5, width_mult=0.1), 32),
        (MobileNetV3(5, width_mult=0.1, strides=(2, 2, 2, 1)), 16),
        (MobileNetV3(5, width_mult=0.1, dilated=True), 16),
    )
    for model, reduction in networks:
        assert model.forward_features(image).shape[2:] == (128 // reduction, 256 // reduction)
        assert model.feature_info[-1]["reduction"] == reduction


def test_a_reduced_tail_halves_the_last_blocks_and_the_head() -> None:
    model = MobileNetV3(5, reduced_tail=True)
    assert [config.out_channels for config in block_configs(1.0, reduced_tail=True)[-3:]] == [80, 80, 80]
    assert (model.num_features, model.head_hidden_size) == (480, 640)


def test_gates_over_frames_refuse_another_length(images) -> None:
    model = MobileNetV3(5, width_mult=0.1, se_dims="t", input_dim_t=100).eval()
    model(images)
    with pytest.raises(ValueError, match="input_dim_t"):
        model(images[..., :64])


def test_channels_last_and_bfloat16_give_the_same_tags() -> None:
    model = MobileNetV3(5, width_mult=0.4).eval()
    image = torch.randn(2, 1, 128, 200)
    with torch.no_grad():
        expected = model(image)
        fast = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(fast(image), expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = fast(image).float()
    assert (rounded - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"head_type": "linear"}, "head_type"),
        ({"se_dims": "x"}, "se_dims"),
        ({"se_dims": ""}, "se_dims"),
        ({"se_agg": "mean"}, "se_agg"),
        ({"se_r": 0}, "se_r"),
        ({"strides": (2, 2, 2)}, "strides"),
        ({"strides": (2, 2, 2, 3)}, "strides"),
        ({"width_mult": 0}, "width_mult"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        MobileNetV3(5, **wrong)
