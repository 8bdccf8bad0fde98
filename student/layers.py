"""The few layers that all students share, under the parameter names of EfficientAT's checkpoints."""

from functools import partial

import torch
from torch import Tensor, nn

from student.depthwise import DepthwiseConv2d

batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
"""Batch normalisation as MobileNetV3 has it."""


def make_divisible(size: float, divisor: int = 8) -> int:
    """Round a layer's size to a multiple, at least that, and never down by more than a tenth, as MobileNets do."""
    rounded = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * size else rounded


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Chain a convolution without bias, batch normalisation and an activation; odd kernels keep the image's size."""
    if groups == in_channels == out_channels:
        convolution = DepthwiseConv2d(in_channels, kernel, stride, dilation)
    else:
        padding = (kernel - 1) // 2 * dilation
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
    layers: list[nn.Module] = [convolution, batch_norm(out_channels)]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def global_average_pool(maps: Tensor) -> Tensor:
    """Average over the image: (batch, channels, mels, frames) → (batch, channels)."""
    return _global_average_pool(maps)


def _is_exporting() -> bool:
    if torch.jit.is_scripting():
        return False
    else:  # noqa: RET505  a branch that TorchScript, which doesn't know the other question, leaves out
        return torch.compiler.is_exporting()


def _global_average_pool(maps: Tensor) -> Tensor:
    # An exported program has one form for all sizes, and would take on the layout that its example has.
    if not _is_exporting() and maps.is_contiguous(memory_format=torch.channels_last):
        # The same numbers, but the gradient keeps the layout; that of a mean over two axes would lose it, and adding
        # it to one of the other layout takes three times as long as all else in squeeze-excitation.
        return maps.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)
    return maps.mean(dim=(2, 3))


torch.fx.wrap("_global_average_pool")  # a graph looks at the layout whenever it runs


class GlobalAveragePool(nn.AdaptiveAvgPool2d):
    """Averages over the image and keeps its axes: (batch, channels, mels, frames) → (batch, channels, 1, 1)."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, maps: Tensor) -> Tensor:
        """Average, without a look at the layout where a program for all sizes is exported."""
        return maps.mean(dim=(2, 3), keepdim=True) if _is_exporting() else super().forward(maps)


def init_weights(module: nn.Module) -> None:
    """Draw starting weights for one module as MobileNetV3 does; use with `nn.Module.apply`."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # shapes without values: torch would take a while to draw nothing
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)
