"""The gradients of depthwise convolutions in bfloat16 are those of torch, in whichever way they are computed."""

import pytest
import torch
from torch import nn

from student.depthwise import DepthwiseConv2d


def gradients(layer: nn.Module, maps: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of a weighted sum of the outputs: those for the maps and for the weights."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(maps)
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, [maps, *layer.parameters()], weights)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (5, 1, 2), (7, 1, 1)]
)
def test_gradients_in_bfloat16_are_torchs_to_rounding(kernel, stride, dilation, layout) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(24, kernel, stride, dilation)
    maps = torch.randn(2, 24, 9, 14).contiguous(memory_format=layout).requires_grad_()
    plain = nn.Conv2d(24, 24, kernel, stride, layer.padding[0], dilation, groups=24, bias=False)
    plain.load_state_dict(layer.state_dict())
    exact = gradients(plain, maps, torch.float32)
    for ours, expected in zip(gradients(layer, maps, torch.bfloat16), exact, strict=True):
        assert (ours.float() - expected).norm() < 0.006 * expected.norm()  # a bfloat16 has 8 bits
    for ours, expected in zip(gradients(layer, maps, torch.float32), exact, strict=True):
        assert torch.equal(ours, expected)


def test_frozen_weights_and_maps_get_no_gradient() -> None:
    layer = DepthwiseConv2d(8, 5)
    maps = torch.randn(1, 8, 9, 9)
    for frozen in (False, True):
        layer.weight.requires_grad_(not frozen)
        given = maps.clone().requires_grad_(frozen)
        with torch.autocast("cpu", torch.bfloat16):
            layer(given).sum().backward()
        assert (given.grad is not None, layer.weight.grad is not None) == (frozen, not frozen)
        layer.weight.grad = None
