"""What timm's own tests ask of a model, asked of every kind of student at tiny sizes."""

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

import student

KINDS: dict[str, dict[str, Any]] = {
    "mn01": {},
    "mn10_as_fc_s2221": {"width_mult": 0.1, "se_dims": "cf"},
    "mn02": {"head_type": "multihead_attention_pooling", "se_dims": "none", "n_mels": 64},
    "mn01_as": {"dilated": True, "reduced_tail": True},
    "dymn04": {"width_mult": 0.1},
    "dymn04_as": {"width_mult": 0.1, "use_dy_blocks": "replace_se", "head_type": "fully_convolutional"},
}


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **{**KINDS.get(name, {}), **kwargs})
    return model.eval()


def image_of(model: Any, clips: int = 2, frames: int = 100) -> Tensor:
    return torch.randn(clips, 1, model.default_cfg["input_size"][1], frames, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_the_configuration_says_what_is_true_of_the_model(name: str) -> None:
    model = build(name, num_classes=5)
    config, weights = model.default_cfg, model.state_dict()
    classifiers = config["classifier"]
    names = {config["first_conv"], *([classifiers] if isinstance(classifiers, str) else classifiers)}
    assert {f"{name}.weight" for name in names} <= weights.keys()
    assert (config["mean"], config["std"], config["crop_pct"]) == ((0.0,), (1.0,), 1.0)
    sound = torch.zeros(1, round(model.input_seconds * model.sample_rate_hz))
    image = model.front_end(sound)
    assert tuple(image.shape[1:]) == config["input_size"]
    assert tuple(model.forward_features(image).shape[2:]) == config["pool_size"]


@pytest.mark.parametrize("name", KINDS)
def test_head_and_classifier_are_timms(name: str) -> None:
    model = build(name, num_classes=5)
    image = image_of(model)
    maps = model.forward_features(image)
    embedding = model.forward_head(maps, pre_logits=True)
    assert embedding.shape == (2, model.head_hidden_size)
    assert 5 in {len(parameter) for parameter in model.get_classifier().parameters()} or "heads" in vars(
        model.classifier
    )
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), embedding)
    assert not list(model.get_classifier().parameters())
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image), maps)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    with pytest.raises(ValueError, match="goes with num_classes=0"):
        model.reset_classifier(7, "")


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_neither_gradients_nor_statistics(name: str) -> None:
    results = []
    for enable in (False, True):
        model = build(name, num_classes=5, drop_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        model(image_of(model)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((gradients, {name: value for name, value in model.named_buffers() if "running" in name}))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", KINDS)
def test_intermediates_and_features_only_agree_at_any_block(name: str) -> None:
    model = build(name, feature_location="block")
    image = image_of(model)
    assert len(model.feature_info) == 17
    last, maps = model.forward_intermediates(image)
    assert torch.equal(last, model.forward_features(image))
    assert torch.equal(last, maps[-1])
    backbone = build(name, features_only=True, feature_location="block", out_indices=(0, 7, 16))
    found = backbone(image)
    assert [map_.shape[1] for map_ in found] == backbone.feature_info.channels()
    assert backbone.feature_info.reduction() == [model.feature_info[block]["reduction"] for block in (0, 7, 16)]
    torch.testing.assert_close(found, [maps[0], maps[7], maps[16]])
    stages = build(name, features_only=True)(image)
    torch.testing.assert_close(stages, [maps[block] for block in (1, 3, 6, 12, 15)])
    (early,) = model.forward_intermediates(image, [2], stop_early=True, intermediates_only=True)
    assert torch.equal(early, maps[2])
    with pytest.raises(ValueError, match="choose from -17 to 16"):
        model.forward_intermediates(image, [17])


@pytest.mark.parametrize("name", KINDS)
def test_graphs_answer_as_the_model_does_for_other_batches_and_lengths(name: str) -> None:
    model = build(name, num_classes=5)
    image, others = image_of(model), image_of(model, clips=3, frames=161)
    free = {0: Dim.AUTO, 3: Dim.AUTO}
    graphs = {
        "fx": torch.fx.symbolic_trace(model),
        "TorchScript": torch.jit.script(model),
    }
    if not name.startswith("dymn"):  # torch guards the parity of what DyMN's average pools take
        graphs["export"] = torch.export.export(model, (image,), dynamic_shapes=(free,)).module()
    wanted = model(others)
    for kind, graph in graphs.items():
        torch.testing.assert_close(graph(others), wanted, msg=lambda message, kind=kind: f"{kind}: {message}")


@pytest.mark.parametrize("name", ["mn01", "dymn04"])
def test_every_parameter_has_a_depth(name: str) -> None:
    model = build(name, num_classes=5)
    depths = group_parameters(model, model.group_matcher(coarse=False))
    named = [parameter for parameters in depths.values() for parameter in parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert len(depths) == 17  # the first convolution, 15 blocks, the head
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 7


def test_drop_rate_is_the_heads_and_a_head_that_drops_nothing_says_so() -> None:
    assert build("mn01", drop_rate=0.4).classifier[4].p == 0.4
    with pytest.raises(ValueError, match="no hidden layer to drop from"):
        build("mn10_as_fc_s2221", drop_rate=0.4)


def test_an_image_has_one_channel_and_its_pooling_is_the_heads() -> None:
    with pytest.raises(ValueError, match="in_chans is 3"):
        build("mn01", in_chans=3)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        build("mn01", global_pool="max")
    with pytest.raises(ValueError, match="feature_location is 'expansion'"):
        build("mn01", feature_location="expansion")


@pytest.mark.parametrize("name", ["mn01_as", "mn10_as_fc_s2221", "dymn04_as"])
def test_a_folder_that_timm_saved_wins_over_the_releases_address(name: str, tmp_path: Path) -> None:
    saved = build(name, num_classes=5)
    save_for_hf(saved, str(tmp_path), safe_serialization=True)
    assert_equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), saved)
    for classes, width in ((0, saved.head_hidden_size), (3, 3)):
        other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes).eval()
        assert other(image_of(saved)).shape == (2, width)
    backbone: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    whole = saved.forward_intermediates(image_of(saved), intermediates_only=True)
    torch.testing.assert_close(backbone(image_of(saved)), whole)


def test_the_hub_wins_over_the_releases_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = build("mn01_as", num_classes=5)
    folder = tmp_path / "models--someone--mn"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    save_for_hf(saved, str(folder / "snapshots" / ("0" * 40)), safe_serialization=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_equal(timm.create_model("hf-hub:someone/mn", pretrained=True, cache_dir=tmp_path), saved)


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_come_with_pretrained_weights(name: str, tmp_path: Path) -> None:
    saved = build(name, num_classes=5)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    image = image_of(saved)
    assert torch.equal(loaded(image), saved.forward_head(saved.forward_features(image), pre_logits=True))
    own = student.create_model(name, tmp_path / "weights.safetensors", num_classes=0, **KINDS[name]).eval()
    assert torch.equal(own(image), loaded(image))


def assert_equal(found: Any, wanted: Any) -> None:
    theirs = found.state_dict()
    assert theirs.keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, theirs[key]) for key, value in wanted.state_dict().items())
