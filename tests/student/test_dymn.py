"""DyMN equals EfficientAT's dynamic network, temperature included."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from student.dymn import DyMN, kernel_temperature
from student.dynamic_layers import Context, DynamicConv
from student.registry import create_model
from student.tagger import Tagger


@pytest.fixture(scope="module")
def reference_model(golden_weights) -> Tagger:
    return create_model("dymn10_as", golden_weights("dymn10")).eval()


@pytest.mark.parametrize(("seconds", "suffix"), [(10, "10s"), (4.3, "4s3")])
def test_waveforms_give_the_reference_logits_and_embeddings(
    golden_dir, golden_config, fill, reference_model, seconds, suffix
) -> None:
    expected = np.load(golden_dir / "dymn10.npz")
    bound = 1e-4 * golden_config("dymn10")["checks"]["logit_std"]
    clips = len(expected[f"logits_{suffix}"])
    sounds = torch.stack([torch.from_numpy(fill.waveform(seconds, 32_000, seed)) for seed in range(clips)])
    with torch.no_grad():
        maps = reference_model.forward_features(reference_model.front_end(sounds))
        logits = reference_model.forward_head(maps)
    np.testing.assert_allclose(logits, expected[f"logits_{suffix}"], atol=bound, rtol=0)
    np.testing.assert_allclose(maps.mean(dim=(2, 3)), expected[f"embedding_{suffix}"], atol=1e-5, rtol=1e-4)


def test_runs_in_channels_last_and_bfloat16(golden_dir, fill, reference_model) -> None:
    expected = torch.from_numpy(np.load(golden_dir / "dymn10.npz")["logits_4s3"])
    features = reference_model.front_end(torch.from_numpy(fill.waveform(4.3, 32_000, 0))[None])
    model = copy.deepcopy(reference_model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(features), expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(features).float()
    assert (rounded - expected).norm() < 0.05 * expected.norm()


def test_temperature_changes_the_tags_and_is_set_everywhere() -> None:
    model = DyMN(5, width_mult=0.2).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    image = torch.randn(1, 1, 128, 64)
    with torch.no_grad():
        untrained = model(image)
        model.temperature = 1.0
        assert not torch.allclose(model(image), untrained)
    convolutions = [module for module in model.modules() if isinstance(module, DynamicConv)]
    assert len(convolutions) == 15 * 3 - 1  # the first block doesn't expand
    assert {module.temperature for module in convolutions} == {1.0}


def test_temperature_falls_as_upstreams_does() -> None:
    model = DyMN(5, width_mult=0.1)
    assert model.temperature == 30.0
    temperatures = []
    for epoch in range(60):
        model.update_params(epoch)
        temperatures.append(model.temperature)
    expected = [max(30.0 - epoch, 1 + 0.02 * 29 - 0.02 * epoch, 1.0) for epoch in range(60)]
    assert temperatures == pytest.approx(expected)
    assert temperatures[28:31] == pytest.approx([2.0, 1.0, 1.0])
    assert kernel_temperature(39, end=0.1) == pytest.approx(0.8)


def test_released_names_start_at_their_temperature() -> None:
    assert create_model("dymn04_as").temperature == 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert create_model("dymn04").temperature == 30.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"kernel": 3}, {"kernel": 5, "stride": 2, "groups": 8}])
def test_each_clip_is_convolved_with_its_own_kernel(settings) -> None:
    torch.manual_seed(0)
    layer = DynamicConv(8, 8, 4, **settings)
    nn.init.normal_(layer.residuals[0].weight)  # pyright: ignore[reportArgumentType]
    maps, nothing = torch.randn(3, 8, 10, 12), torch.empty(0)
    together = layer(maps, context := Context(torch.randn(3, 4), nothing, nothing))
    for clip in range(3):
        mixture = (layer.residuals(context.summary[clip]) / layer.temperature).softmax(-1)
        kernel = (mixture[:, None] * layer.weight[0, 0]).sum(0).view(layer.kernel_shape)
        alone = nn.functional.conv2d(
            maps[clip : clip + 1], kernel, stride=layer.stride, padding=layer.padding, groups=layer.groups
        )
        torch.testing.assert_close(together[clip : clip + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "variant",
    [
        {"no_dyconv": True},
        {"no_dyrelu": True},
        {"no_ca": True},
        {"use_dy_blocks": "replace_se"},
        {"dyrelu_k": 3, "dyconv_k": 2},
        {"strides": (2, 2, 1, 1), "head_type": "fully_convolutional"},
    ],
)
def test_every_variant_tags_and_learns(variant) -> None:
    model = DyMN(5, width_mult=0.2, **variant)
    model(torch.randn(2, 1, 128, 64)).square().sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    attention = {name for name in unused if ".context_gen.conv_" in name}
    assert unused == (attention if variant.get("no_ca") else set())


def test_static_layers_carry_upstreams_names() -> None:
    keys = DyMN(5, width_mult=0.2, no_dyconv=True, no_dyrelu=True).state_dict()
    assert "layers.3.exp_conv.module.weight" in keys
    assert not any("depth_act" in key for key in keys)
    replaced = DyMN(5, width_mult=0.2, use_dy_blocks="replace_se").state_dict()
    assert "layers.0.block.0.0.weight" in replaced
    assert "layers.3.depth_act.lambdas" in replaced


def test_an_unknown_kind_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="use_dy_blocks"):
        DyMN(5, use_dy_blocks="some")  # pyright: ignore[reportArgumentType]


def test_what_is_exported_computes_the_same_without_a_group_for_each_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("dymn04", T_max=1.0, n_mels=40, hopsize=1600).eval()
    images = torch.randn(3, 1, 40, 20)
    with torch.inference_mode():
        expected = model(images)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(model(images), expected)
