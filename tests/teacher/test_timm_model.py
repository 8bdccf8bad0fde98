"""What timm's own tests ask of a model, asked of every family of teachers at tiny sizes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models._manipulate import group_parameters
from torch import Tensor
from torch.export import Dim

import teacher  # noqa: F401 - registers the names

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = [
    "passt_tiny",
    "ast_tiny",
    "ced_tiny",
    "eat_base",
    "sslam",
    "beats",
    "m2d",
    "atst_frame_base",
    "atst_clip_base",
]


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def features_of(model: Any, clips: int = 2) -> Tensor:
    """As many frames as the model needs, or few, in timm's layout: (clips, 1, …)."""
    _, *size = model.default_cfg["input_size"]
    if not model.default_cfg["fixed_input_size"]:
        axis = 0 if model.front_end.time_first else 1
        size[axis] = 204
    return torch.randn(clips, 1, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_says_what_is_true_of_the_model(name: str) -> None:
    model = build(name, num_classes=5)
    config, weights = model.default_cfg, model.state_dict()
    assert {f"{config['first_conv']}.weight", f"{config['classifier']}.weight"} <= weights.keys()
    assert (config["mean"], config["std"], config["crop_pct"]) == ((0.0,), (1.0,), 1.0)
    seconds = torch.zeros(1, round(model.input_seconds * model.sample_rate_hz))
    assert (1, *model.front_end.eval()(seconds).shape[1:]) == config["input_size"]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_head_and_classifier_are_timms(name: str) -> None:
    model, features = build(name, num_classes=5), features_of(build(name))
    sequence = model.forward_features(features)
    embedding = model.forward_head(sequence, pre_logits=True)
    assert sequence.shape[-1] == model.num_features == 32
    assert embedding.shape == (2, model.head_hidden_size)
    logits = model(features)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(model.forward_head(sequence), logits)
    torch.testing.assert_close(model(features[:, 0]), logits)  # without the channel axis
    assert model.get_classifier().weight.shape == (5, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(features), embedding)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(features), sequence)
    model.reset_classifier(7)
    assert model(features).shape == (2, 7)
    with pytest.raises(ValueError, match="pools in its own way"):
        model.reset_classifier(7, "max")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient_with_checkpointing_and_without(name: str) -> None:
    model, gradients = build(name, num_classes=5), []
    features = features_of(model)
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(features).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediates_are_what_the_blocks_give(name: str) -> None:
    model = build(name, num_classes=5)
    features = features_of(model)
    heard: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: heard.append(output))
    last, maps = model.forward_intermediates(features)
    torch.testing.assert_close(last, model.forward_features(features))
    assert len(maps) == 3
    for map_, output in zip(maps, heard, strict=False):
        assert map_.shape[:2] == (2, 32)
        tokens = output[:, output.shape[1] - map_[0, 0].numel() :]
        torch.testing.assert_close(map_.sum((2, 3)), tokens.sum(1), rtol=1e-4, atol=1e-4)
    del heard[:]
    (first,) = model.forward_intermediates(features, [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert len(heard) == 1
    assert first.shape == (2, maps[0][0, 0].numel(), 32)
    with pytest.raises(ValueError, match="there are 3 blocks"):
        model.forward_intermediates(features, [3])


@pytest.mark.parametrize("name", FAMILIES)
def test_features_only_gives_the_maps_of_any_block(name: str) -> None:
    backbone = build(name, features_only=True, out_indices=(0, -2))
    whole = build(name)
    features = features_of(whole)
    maps = backbone(features)
    assert [map_.shape[1] for map_ in maps] == backbone.feature_info.channels() == [32, 32]
    torch.testing.assert_close(maps, whole.forward_intermediates(features, (0, 1), intermediates_only=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_answer_as_the_model_does_for_other_batches_and_lengths(name: str) -> None:
    model = build(name, num_classes=5)
    features = features_of(model)
    free: dict[int, Any] = {0: Dim.AUTO}
    others = features.repeat(3, 1, 1, 1)[:5]
    if not model.default_cfg["fixed_input_size"]:
        axis = 2 if model.front_end.time_first else 3
        free[axis] = Dim.AUTO
        others = others.narrow(axis, 0, 171)
    graphs = {
        "fx": torch.fx.symbolic_trace(model),
        "TorchScript": torch.jit.script(model),
        "export": torch.export.export(model, (features,), dynamic_shapes=(free,)).module(),
    }
    wanted = model(others)
    for kind, graph in graphs.items():
        torch.testing.assert_close(graph(others), wanted, msg=lambda message, kind=kind: f"{kind}: {message}")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_depth(name: str) -> None:
    model = build(name, num_classes=5)
    depths = group_parameters(model, model.group_matcher(coarse=False))
    named = [parameter for parameters in depths.values() for parameter in parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    (of_first,) = [depth for depth, names in depths.items() if "blocks.0.attn.qkv.weight" in names]
    (of_head,) = [depth for depth, names in depths.items() if "head.1.weight" in names]
    assert 0 < of_first < of_head
    assert len(group_parameters(model, model.group_matcher(coarse=True))) < len(depths)


def test_drop_rate_drops_from_the_pooled_vector_in_training_alone() -> None:
    model = build("ced_tiny", drop_rate=0.5)
    pooled = torch.arange(32.0)[None]
    assert torch.equal(model.classify(pooled), model.classify(pooled))
    model.train()
    assert not torch.equal(model.classify(pooled), model.classify(pooled))
    with pytest.raises(ValueError, match="drop_rate is 2"):
        build("ced_tiny", drop_rate=2)


def test_sound_has_one_channel() -> None:
    with pytest.raises(ValueError, match="in_chans is 3"):
        build("ced_tiny", in_chans=3)


def test_a_longer_clip_than_one_piece_has_no_one_sequence_of_features() -> None:
    model = build("ced_tiny")
    assert model(torch.randn(1, 64, 1100)).shape == (1, 527)
    halves = torch.randn(1, 64, 2024)
    model.reset_classifier(0)
    parts = torch.stack([model(halves[..., :1012]), model(halves[..., 1012:])])
    torch.testing.assert_close(model(halves), parts.mean(dim=0))
    with pytest.raises(ValueError, match="1100 frames, and ced_tiny takes longer clips than 1012 piece by piece"):
        model.forward_features(torch.randn(1, 64, 1100))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_timm_saved_is_loaded_by_its_own_name(name: str, tmp_path: Path) -> None:
    saved = build(name, num_classes=5)
    save_for_hf(saved, str(tmp_path), safe_serialization=True)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(loaded, type(saved))
    assert_equal(loaded, saved)
    features = features_of(saved)
    for classes, width in ((0, saved.head_hidden_size), (3, 3)):
        other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes).eval()
        assert other(features).shape == (2, width)
    backbone: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    assert_equal(backbone.model.blocks, saved.blocks)


def test_the_hub_wins_over_the_releases_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = build("ced_tiny", num_classes=5)
    cached_on_the_hub(saved, "someone/ced", tmp_path, monkeypatch)
    loaded = timm.create_model("hf-hub:someone/ced", pretrained=True, cache_dir=tmp_path)
    assert_equal(loaded, saved)


def test_embeddings_come_with_pretrained_weights(tmp_path: Path) -> None:
    saved = build("beats", num_classes=5)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    loaded = build("beats", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert_equal(loaded.blocks, saved.blocks)
    assert loaded(features_of(loaded)).shape == (2, 32)


def assert_equal(found: Any, wanted: Any) -> None:
    theirs = found.state_dict()
    assert theirs.keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, theirs[key]) for key, value in wanted.state_dict().items())


def cached_on_the_hub(model: Any, repository: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a model where the Hub's client keeps what it has fetched, and have it ask nobody."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    save_for_hf(model, str(folder / "snapshots" / ("0" * 40)), safe_serialization=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
