"""The heads pool as their papers say."""

import pytest
import torch

from student.heads import AttentionPoolingHead, FullyConvolutionalHead, HeadType
from student.mobilenetv3 import MobileNetV3


def test_attention_pooling_weighs_each_frame_for_each_class() -> None:
    torch.manual_seed(0)
    head = AttentionPoolingHead(6, 3, heads=2)
    torch.nn.init.normal_(head.subspace_proj.weight)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        head.head_weight.copy_(torch.tensor([0.3, 0.9]).view(1, 2, 1))
    maps = torch.randn(2, 6, 4, 5)
    outputs = head.subspace_proj(maps.mean(2).transpose(1, 2))  # (batch, frames, attention and value x heads x classes)
    expected = torch.zeros(2, 3)
    for clip in range(2):
        for kind in range(3):
            for one, weight in enumerate((0.3, 0.9)):
                attention = outputs[clip, :, one * 3 + kind].sigmoid()
                values = outputs[clip, :, 6 + one * 3 + kind]
                expected[clip, kind] += weight * (attention * values).sum() / attention.sum()
    torch.testing.assert_close(head(maps), expected)


def test_the_fully_convolutional_head_normalises_before_it_averages() -> None:
    head = FullyConvolutionalHead(6, 3).eval()
    torch.nn.init.uniform_(head[1].running_var)  # pyright: ignore[reportArgumentType]
    maps = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(head(maps), head[1](head[0](maps)).mean(dim=(2, 3)))
    assert head[1].eps == 1e-5


def test_pooling_stays_in_float32_under_autocast() -> None:
    head = AttentionPoolingHead(6, 3, heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(2, 6, 4, 5)).dtype == torch.float32


@pytest.mark.parametrize("head_type", ["mlp", "fully_convolutional", "multihead_attention_pooling"])
def test_what_a_student_says_is_not_rounded_under_autocast(head_type: HeadType) -> None:
    model = MobileNetV3(7, width_mult=0.2, head_type=head_type).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model.forward_features(torch.randn(2, 1, 128, 200))
        found = [model.forward_head(maps), model.forward_head(maps, pre_logits=True), model.forward_frames(maps)]
        images = torch.randn(2, 1, 128, 200)
        embedded, its_maps = model.embed(images), model.forward_features(images)
    assert maps.dtype == torch.bfloat16
    head, full = model.classifier, maps.float()
    with torch.no_grad():
        for values, exact in zip(found, [head(full), head.pre_logits(full), head.frame_logits(full)], strict=True):
            assert torch.equal(values, exact)
    assert torch.equal(embedded, its_maps.float().mean(dim=(2, 3)))
