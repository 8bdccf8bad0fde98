"""Depthwise convolutions whose gradients in bfloat16 are as fast on a CPU as their forward pass.

torch hands convolutions to oneDNN. Of a depthwise convolution's gradients in bfloat16 it has fast kernels for some
shapes only; for the others it takes 3 to 10 times longer than in float32, and they made two fifths of a training step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.tracing import is_traced


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel on its own, without bias; odd square kernels keep the image's size."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        padding = (kernel - 1) // 2 * dilation
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve (batch, channels, mels, frames)."""
        if is_traced(maps):
            return super().forward(maps)
        learns = torch.is_grad_enabled() and self.bias is None  # batch norms folded into it leave a bias
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else maps.dtype
        if learns and maps.device.type == "cpu" and dtype == torch.bfloat16:
            steps = (self.stride[0], self.padding[0], self.dilation[0])
            return _Bfloat16Depthwise.apply(maps.to(dtype), self.weight.to(dtype), *steps)
        return super().forward(maps)


class _Bfloat16Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.steps = stride, padding, dilation
        return F.conv2d(maps, weight, None, stride, padding, dilation, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        maps, weight = ctx.saved_tensors
        for_maps, for_weight = ctx.needs_input_grad[:2]
        stride, padding, dilation = ctx.steps
        return (
            _gradient_for_maps(gradient, maps, weight, stride, padding, dilation) if for_maps else None,
            _gradient_for_weight(gradient, maps, weight, stride, padding, dilation) if for_weight else None,
            None,
            None,
            None,
        )


def _gradient_for_maps(
    gradient: Tensor, maps: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """(batch, channels, mels, frames)."""
    if stride == 1:
        return _backward(gradient, maps, weight, stride, padding, dilation, (True, False))[0]
    # In float32, because for steps in bfloat16 oneDNN has no fast kernel. Of the maps only the shape is asked for.
    wide = gradient.float(), torch.empty_like(maps, dtype=torch.float32), weight.float()
    return _backward(*wide, stride, padding, dilation, (True, False))[0].to(maps.dtype)


def _gradient_for_weight(
    gradient: Tensor, maps: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """(channels, 1, kernel, kernel)."""
    if weight.shape[-1] != 5:
        return _backward(gradient, maps, weight, stride, padding, dilation, (False, True))[1]
    # The 3 x 3 kernel is the largest that oneDNN has a fast gradient for, and a 5 x 5 kernel is four of them that
    # overlap, each meeting the image moved by two places.
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).permute(0, 3, 1, 2)
    high, wide = (stride * (size - 1) + 2 * dilation + 1 for size in gradient.shape[2:])
    result = torch.empty_like(weight)
    for down in (0, 2):
        for right in (0, 2):
            top, left = down * dilation, right * dilation
            part = padded[:, :, top : top + high, left : left + wide]
            corner = weight[:, :, down : down + 3, right : right + 3]
            result[:, :, down : down + 3, right : right + 3] = _backward(
                gradient, part, corner, stride, 0, dilation, (False, True)
            )[1]
    return result


def _backward(
    gradient: Tensor,
    maps: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Returns the gradients for maps and weight, those that are wanted."""
    gradients = torch.ops.aten.convolution_backward(
        gradient,
        maps,
        weight,
        None,
        [stride] * 2,
        [padding] * 2,
        [dilation] * 2,
        False,
        [0, 0],
        len(weight),
        (*wanted, False),
    )
    return gradients[:2]
