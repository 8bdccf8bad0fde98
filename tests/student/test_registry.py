"""Every name builds what it says, here and in timm; a checkpoint that doesn't fit says so."""

import logging
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from student.registry import create_model, load_weights, looks_like, model_card, model_names


def test_every_name_builds_and_knows_its_name() -> None:
    distinct = {str(model_card(name).settings): name for name in model_names() if model_card(name).weights_url}
    with torch.device("meta"):
        for name in ("mn01", "mn23", *distinct.values()):
            model = create_model(name)
            assert model.model_name == name
            assert (model.sample_rate_hz, model.input_seconds, model.num_classes) == (32_000, 10.0, 527)


@pytest.mark.parametrize(
    ("name", "mels", "hop", "reduction", "head"),
    [
        ("mn10_as_hop_15", 128, 480, 32, "MlpHead"),
        ("mn10_as_hop_5", 128, 160, 32, "MlpHead"),
        ("mn10_as_mels_40", 40, 320, 32, "MlpHead"),
        ("mn10_as_fc_s2221", 128, 320, 16, "FullyConvolutionalHead"),
        ("mn10_as_fc_s2211", 128, 320, 8, "FullyConvolutionalHead"),
    ],
)
def test_a_released_name_sets_network_and_front_end_together(name, mels, hop, reduction, head) -> None:
    with torch.device("meta"):
        model = create_model(name)
    config = model.front_end.config
    assert (config.mels, config.hop_samples) == (mels, hop)
    assert model.feature_info[-1]["reduction"] == reduction
    assert type(model.classifier).__name__ == head


def test_the_width_is_in_the_name_and_a_keyword_wins() -> None:
    assert model_card("mn07").settings["width_mult"] == 0.7
    with torch.device("meta"):
        assert create_model("mn10", width_mult=0.4).num_features == create_model("mn04").num_features


def test_cards_tell_where_weights_come_from() -> None:
    card = model_card("mn40_as(3)")
    assert str(card.weights_url).endswith("/v0.0.1/mn40_as_mAP_483(2).pt")
    assert (card.published_map, card.licence) == (0.483, "MIT")
    assert model_card("mn10").weights_url is None


def test_timm_builds_the_same_models_under_the_same_names() -> None:
    model: Any = timm.create_model("mn04", num_classes=12).eval()
    image = torch.randn(2, 1, 128, 64)
    maps = model.forward_features(image)
    assert maps.shape == (2, model.num_features, 4, 2)
    assert model.forward_head(maps).shape == (2, model.num_classes) == (2, 12)
    assert model.forward_head(maps, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(image).shape == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    assert isinstance(model.get_classifier(), torch.nn.Module)
    assert {"mn01", "mn40", "mn10_as_fc_s2211", "dymn20_as"} <= set(timm.list_models())
    assert "mn10_as" in timm.list_models(pretrained=True)


@pytest.mark.parametrize("name", ["mn04", "mn10_as_fc_s2211", "dymn04"])
def test_timm_extracts_features_at_five_scales(name) -> None:
    backbone: Any = timm.create_model(name, features_only=True).eval()
    image = torch.randn(1, 1, 128, 64)
    maps = backbone(image)
    assert len(maps) == 5
    for stage, channels, reduction in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert stage.shape == (1, channels, 128 // reduction, 64 // reduction)


@pytest.mark.parametrize("head", ["mlp", "fully_convolutional", "multihead_attention_pooling"])
def test_a_model_without_classes_returns_what_the_last_layer_would_see(head) -> None:
    model = create_model("mn01", num_classes=0, head_type=head).eval()
    image = torch.randn(1, 1, 128, 64)
    assert torch.equal(model(image), model.forward_head(model.forward_features(image), pre_logits=True))
    assert model(image).shape == (1, model.head_hidden_size)


def test_another_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="global_pool"):
        create_model("mn01").reset_classifier(3, global_pool="max")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_file_loads_whole(tmp_path, suffix) -> None:
    source = create_model("mn01", num_classes=3)
    path = tmp_path / f"mn01.{suffix}"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(source.state_dict(), path)
    loaded = create_model("mn01", path, num_classes=3)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("name", ["mn01", "mn01_as", "dymn04"])
def test_weights_that_a_checkpoint_brings_are_not_drawn_first(name) -> None:
    source = create_model(name, num_classes=3).state_dict()
    before = torch.get_rng_state()
    loaded = create_model(name, source, num_classes=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(loaded[key], value) for key, value in source.items())


def test_a_last_layer_that_starts_anew_is_the_one_of_that_seed() -> None:
    torch.manual_seed(3)
    fresh = create_model("mn01", num_classes=3).state_dict()
    torch.manual_seed(3)
    model = create_model("mn01", create_model_without_a_trace("mn01"), num_classes=3).state_dict()
    assert all(torch.equal(model[key], fresh[key]) for key in ("classifier.5.weight", "classifier.5.bias"))


def create_model_without_a_trace(name: str) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        return create_model(name, num_classes=5).state_dict()


@pytest.mark.parametrize("name", ["mn01_as", "mn10_as_fc"])
def test_timm_fits_released_weights_to_another_number_of_classes(tmp_path, name) -> None:
    released = create_model(name)
    torch.save(released.state_dict(), path := tmp_path / "released.pt")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=3)
    assert model.num_classes == 3
    assert torch.equal(model.state_dict()["features.0.0.weight"], released.state_dict()["features.0.0.weight"])


@pytest.mark.parametrize("head", ["mlp", "fully_convolutional", "multihead_attention_pooling"])
def test_another_number_of_classes_starts_the_last_layer_anew_and_says_so(caplog, head) -> None:
    source = create_model("mn01", num_classes=5, head_type=head).state_dict()
    with caplog.at_level(logging.WARNING):
        model = create_model("mn01", source, num_classes=3, head_type=head)
    assert "starts anew" in caplog.text
    assert model(torch.randn(2, 1, 128, 64)).shape == (2, 3)
    assert torch.equal(model.state_dict()["features.5.block.0.0.weight"], source["features.5.block.0.0.weight"])


def test_a_checkpoint_that_does_not_fit_names_keys_shapes_and_the_model_it_looks_like(tmp_path) -> None:
    path = tmp_path / "mn02.pt"
    torch.save(create_model("mn02").state_dict(), path)
    with pytest.raises(ValueError, match=r"mn02\.pt doesn't fit mn01: .*classifier|.*of another shape.*mn02") as caught:
        create_model("mn01", path)
    assert "instead of" in str(caught.value)
    assert "looks like mn02" in str(caught.value)


def test_missing_and_unknown_keys_are_named() -> None:
    model = create_model("mn01")
    state_dict = model.state_dict()
    state_dict["extra.weight"] = state_dict.pop("features.0.0.weight")
    with pytest.raises(ValueError, match=r"1 missing: features\.0\.0\.weight .*1 unknown: extra\.weight"):
        load_weights(model, state_dict)


def test_looks_like_tells_heads_and_families_apart() -> None:
    with torch.device("meta"):
        assert looks_like(create_model("mn10_as_fc", num_classes=3).state_dict()) == "mn10_as_fc"
        assert looks_like(create_model("dymn04").state_dict()) == "dymn04"
    assert looks_like({"weight": torch.zeros(3)}) is None


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"mn01 to mn40.*mn10_as_hop_15"):
        create_model("mobilenet")


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="depth"):
        create_model("mn10", depth=3)
