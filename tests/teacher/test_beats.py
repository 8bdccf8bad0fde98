from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teacher
from teacher.audioset import class_ids
from teacher.beats import BEATs, GatedBiasAttention
from teacher.inference import optimise_for_inference
from teacher.state_dicts import read_checkpoint

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def small(classes: int = 5) -> BEATs:
    torch.manual_seed(0)
    model = teacher.create_model("beats", num_classes=classes, **SMALL).eval()
    assert isinstance(model, BEATs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))  # so that biases and gates count
    return model


def released(model: BEATs) -> dict[str, Tensor]:
    """A model's weights as the releases name them, the convolution as length and direction."""
    theirs: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        block = key.replace("blocks.", "encoder.layers.").replace(".mlp.", ".")
        for ours, name in (
            (".norm1.", ".self_attn_layer_norm."),
            (".norm2.", ".final_layer_norm."),
            (".attn.proj.", ".self_attn.out_proj."),
            (".attn.position_gate.", ".self_attn.grep_linear."),
            (".attn.position_scale", ".self_attn.grep_a"),
            ("input_norm.", "encoder.layer_norm."),
            ("patch_norm.", "layer_norm."),
            ("patch_proj.", "post_extract_proj."),
            ("patch_embed.proj.", "patch_embedding."),
            ("pos_conv.bias", "encoder.pos_conv.0.bias"),
            ("head.1.", "predictor."),
        ):
            block = block.replace(ours, name)
        if ".attn.qkv." in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                theirs[block.replace(".attn.qkv.", f".self_attn.{letter}_proj.")] = part
        elif key == "relative_bias":
            theirs |= {f"encoder.layers.{i}.self_attn.relative_attention_bias.weight": value for i in range(2)}
        elif key == "pos_conv.weight":
            length = value.norm(dim=(0, 1), keepdim=True)
            theirs |= {"encoder.pos_conv.0.weight_g": length, "encoder.pos_conv.0.weight_v": 3 * value}
        else:
            theirs[block] = value
    return theirs


def test_a_released_files_classes_are_brought_into_audiosets_order(tmp_path: Path) -> None:
    model = small(527)
    order = torch.randperm(527, generator=torch.Generator().manual_seed(1))
    weights = released(model)
    weights |= {key: weights[key][order] for key in ("predictor.weight", "predictor.bias")}
    labels = {place: class_ids()[int(number)] for place, number in enumerate(order)}
    content = {"cfg": {"encoder_layers": 2}, "model": weights, "label_dict": labels}
    torch.save(content, tmp_path / "BEATs_iter3_finetuned_on_AS2M_cpt1.pt")
    loaded = teacher.create_model("beats_iter3", tmp_path / "BEATs_iter3_finetuned_on_AS2M_cpt1.pt", **SMALL)
    ours = model.state_dict()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, ours[key], rtol=1e-6, atol=1e-7)


def test_a_list_that_is_not_audiosets_keeps_its_order() -> None:
    weights = released(small(3))
    content: Any = {"model": weights, "label_dict": {0: "dog", 1: "cat", 2: "crow"}}
    assert torch.equal(read_checkpoint(content).tensors["head.1.weight"], weights["predictor.weight"])


def test_audiosets_classes_are_those_of_its_list() -> None:
    assert len(set(class_ids())) == 527
    assert class_ids()[:2] == ("/m/09x0r", "/m/05zppz")


def test_hostile_settings_beside_the_weights_are_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"cfg": Runs(), "model": released(small()), "label_dict": {}}, tmp_path / "BEATs_iter1.pt")
    with pytest.raises(ValueError, match="would run code when loaded"):
        read_checkpoint(tmp_path / "BEATs_iter1.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_that_no_program_can_fetch_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"fetched by hand from https://github.*beats; then give beats_iter2=FILE"):
        teacher.create_model("beats_iter2", pretrained=True)


def test_fused_attention_adds_the_gated_bias_that_plain_attention_adds(clips: Callable[..., Tensor]) -> None:
    model = small()
    with torch.inference_mode():
        features = model.front_end(clips(16000, 2.0))
        fused = model(features)
        for module in model.modules():
            if isinstance(module, GatedBiasAttention):
                module.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(model(features), fused, rtol=0, atol=1e-5)
        model.relative_bias.zero_()
        assert (model(features) - fused).abs().max() > 1e-3


def test_a_bias_depends_on_the_distance_alone_and_saturates_far_away() -> None:
    bias = small().attention_bias(torch.empty(1, 2000, 1))
    assert bias.shape == (2, 2000, 2000)
    torch.testing.assert_close(bias[:, 5, 9], bias[:, 100, 104])
    assert not torch.equal(bias[:, 9, 5], bias[:, 5, 9])
    torch.testing.assert_close(bias[:, 0, 1900], bias[:, 0, 1999])
    assert not torch.equal(bias[:, 0, 79], bias[:, 0, 78])


def test_bfloat16_changes_logits_little(clips: Callable[..., Tensor]) -> None:
    model = small()
    with torch.inference_mode():
        features = model.front_end(clips(16000, 2.0))
        exact = model(features)
        optimise_for_inference(model, torch.bfloat16)
        assert (model(features) - exact).abs().max() < 0.05 * exact.std()


def test_patchout_is_refused_and_every_weight_learns(clips: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="BEATs has no patchout"):
        teacher.create_model("beats", u_patchout=4, **SMALL)
    model = small().train()
    model(model.front_end(clips(16000, 1.0))).square().sum().backward()
    assert not [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert model.no_weight_decay() == {"relative_bias"}
    assert isinstance(model.head[0], nn.Identity)
