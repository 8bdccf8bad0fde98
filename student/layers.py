"""The few layers that all students share, under the parameter names of EfficientAT's checkpoints."""

from functools import partial

from torch import nn

batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
"""Batch normalisation as MobileNetV3 has it."""


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
    padding = (kernel - 1) // 2 * dilation
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False),
        batch_norm(out_channels),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def initialise(module: nn.Module) -> None:
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
