"""A student starts from what others trained: the same answers as far as the layers are the same."""

import logging
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from student.registry import create_model
from student.warm_start import IMAGENET_WEIGHTS, from_imagenet


def fill(model: nn.Module) -> nn.Module:
    """Draw weights and statistics that make every layer matter."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            fan_in = value[0].numel() if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * (1.6 / fan_in) ** 0.5)
    return model.eval()


def torchvisions() -> nn.Module:
    model = torchvision.models.mobilenet_v3_large()
    for module in model.modules():
        if isinstance(module, torchvision.ops.SqueezeExcitation):
            module.scale_activation = nn.Sigmoid()  # the one layer that is another one
    return fill(model)


def timms() -> nn.Module:
    model = timm.create_model("mobilenetv3_large_100")
    for module in model.modules():
        if hasattr(module, "gate"):
            module.gate = nn.Sigmoid()
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return fill(model)


@pytest.mark.parametrize("make", [torchvisions, timms])
def test_the_body_answers_a_grey_image_as_the_original_does(make, caplog: pytest.LogCaptureFixture) -> None:
    theirs: Any = make()
    with caplog.at_level(logging.WARNING):
        ours = create_model("mn10", theirs.state_dict(), warm_start=True, num_classes=5).eval()
    image = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if make is timms:
            expected = theirs.forward_features(image.expand(-1, 3, -1, -1))
            hidden = theirs.forward_head(expected, pre_logits=True)
        else:
            expected = theirs.features(image.expand(-1, 3, -1, -1))
            hidden = theirs.classifier[:2](theirs.avgpool(expected).flatten(1))
        torch.testing.assert_close(ours.forward_features(image), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.forward_head(expected, pre_logits=True), hidden, rtol=1e-3, atol=1e-4)
    assert "310 of 312 tensors taken; afresh: classifier.5.weight, classifier.5.bias; left behind: " in caplog.text
    assert "left behind: classifier.5.weight, classifier.5.bias" in caplog.text


def test_it_is_never_taken_for_a_student(tmp_path) -> None:
    with pytest.raises(ValueError, match="it is an image network's; it can only be trained from"):
        create_model("mn10", torchvision.models.mobilenet_v3_large().state_dict())


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"features\.0\.0\.weight \(16, 1, 3, 3\) instead of \(8, 1, 3, 3\)"):
        create_model("mn04", torchvision.models.mobilenet_v3_large().state_dict(), warm_start=True)


def test_another_head_and_other_gates_start_afresh(caplog: pytest.LogCaptureFixture) -> None:
    source: dict[str, Tensor] = create_model("mn02", num_classes=1000).state_dict()
    with caplog.at_level(logging.WARNING):
        model = create_model(
            "mn02", source, warm_start=True, num_classes=3, head_type="fully_convolutional", se_dims="cf"
        )
    state = model.state_dict()
    assert torch.equal(
        state["features.4.block.2.conc_se_layers.0.fc1.weight"],
        source["features.4.block.2.conc_se_layers.0.fc1.weight"],
    )
    assert "features.4.block.2.conc_se_layers.1.fc1.weight" in caplog.text
    assert "left behind: classifier.2.weight" in caplog.text
    assert model(torch.zeros(1, 1, 128, 1000)).shape == (1, 3)
    with pytest.raises(ValueError, match="doesn't fit mn02"):
        create_model("mn02", source, num_classes=3, head_type="fully_convolutional")


def test_the_places_of_imagenets_weights_are_their_publishers() -> None:
    cfg = timm.get_pretrained_cfg("mobilenetv3_large_100")
    assert cfg is not None
    assert f"/{cfg.hf_hub_id}/resolve/" in IMAGENET_WEIGHTS["mobilenetv3_large_100"]
    weights = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V2
    assert weights.url == IMAGENET_WEIGHTS["mobilenet_v3_large"]


def test_other_checkpoints_are_left_to_the_ordinary_way() -> None:
    assert from_imagenet(create_model("mn01").state_dict()) is None
