"""Layers whose weights depend on the sound at hand: Schmid, Koutini, Widmer 2023, arXiv:2310.15648, Section IV.

A `Context` is computed once a block and steers its convolutions, its activation and its attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.layers import batch_norm


class Context(NamedTuple):
    """What a block makes of its input before it works on it."""

    summary: Tensor
    """(batch, context_size): the whole image in one vector."""

    mels: Tensor
    """(batch, channels, mels, 1): one logit for each band."""

    frames: Tensor
    """(batch, channels, 1, frames): one logit for each frame."""


class ContextGenerator(nn.Module):
    """Summarises a block's input along both axes of the image."""

    def __init__(self, context_size: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.joint_conv = nn.Conv2d(in_channels, context_size, 1, bias=False)
        self.joint_norm = batch_norm(context_size)
        self.joint_act = nn.Hardswish(inplace=True)
        self.conv_f = nn.Conv2d(context_size, channels, 1)
        self.conv_t = nn.Conv2d(context_size, channels, 1)
        # The attention meets the image after the depthwise convolution, so it steps with it.
        steps = stride > 1
        self.pool_f = nn.AvgPool2d((3, 1), (stride, 1), (1, 0)) if steps else nn.Identity()
        self.pool_t = nn.AvgPool2d((1, 3), (1, stride), (0, 1)) if steps else nn.Identity()

    def forward(self, maps: Tensor) -> Context:
        """Summarise (batch, in_channels, mels, frames)."""
        mels, frames = maps.shape[2:]
        over_mels, over_frames = maps.mean(dim=3), maps.mean(dim=2)  # (batch, in_channels, mels), (…, frames)
        both = torch.cat([over_mels, over_frames], dim=2).unsqueeze(3)  # (batch, in_channels, mels + frames, 1)
        both = self.joint_act(self.joint_norm(self.joint_conv(both)))  # (batch, context_size, mels + frames, 1)
        by_mel, by_frame = both.split([mels, frames], dim=2)
        return Context(
            summary=both.mean(dim=(2, 3)),
            mels=self.conv_f(self.pool_f(by_mel)),
            frames=self.conv_t(self.pool_t(by_frame.transpose(2, 3))),
        )


class DynamicConv(nn.Module):
    """A convolution whose kernel is, for each clip, a mixture of a few learned ones (Equations 5 and 6)."""

    divisor: Tensor
    """The temperature as a tensor, so that a compiled network need not be compiled anew for another."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        context_size: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        kernels: int = 4,
    ) -> None:
        super().__init__()
        self.out_channels, self.kernel, self.groups = out_channels, kernel, groups
        self.stride, self.dilation, self.padding = stride, dilation, (kernel - 1) // 2 * dilation
        self.register_buffer("divisor", torch.ones(()), persistent=False)
        self.kernel_shape = (out_channels, in_channels // groups, kernel, kernel)
        self.residuals = nn.Sequential(nn.Linear(context_size, kernels))
        bank = torch.empty(kernels, *self.kernel_shape)
        for one in bank:
            nn.init.kaiming_normal_(one, mode="fan_out")
        self.weight = nn.Parameter(bank.view(1, 1, kernels, -1))

    @property
    def temperature(self) -> float:
        """Softness of the choice among kernels, 1 or more."""
        return float(self.divisor)

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.divisor.fill_(value)

    def forward(self, maps: Tensor, context: Context) -> Tensor:
        """Convolve (batch, in_channels, mels, frames), each clip with its own kernel."""
        batch, channels, mels, frames = maps.shape
        mixture = (self.residuals(context.summary) / self.divisor).softmax(dim=-1)  # (batch, kernels)
        if torch.compiler.is_exporting():
            return self._mix_results(maps, mixture)
        weights = mixture.to(self.weight.dtype) @ self.weight[0, 0]  # (batch, weights of one kernel)
        if self.kernel == 1 and self.stride == 1 and self.groups == 1:
            # A product of matrices for each clip is many times faster than a convolution with a group for each clip.
            weights = weights.view(batch, self.out_channels, channels).to(maps.dtype)
            return (weights @ maps.flatten(2)).view(batch, self.out_channels, mels, frames)
        out = F.conv2d(
            maps.reshape(1, batch * channels, mels, frames),
            weights.view(batch * self.out_channels, *self.kernel_shape[1:]).to(maps.dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=batch * self.groups,
        )
        return out.view(batch, self.out_channels, out.shape[2], out.shape[3])

    def _mix_results(self, maps: Tensor, mixture: Tensor) -> Tensor:
        """Mix the kernels' results in place of the kernels: the same, and no number of groups depends on the batch."""
        kernels = self.weight.view(-1, *self.kernel_shape)
        if self.kernel == 1 and self.stride == 1 and self.groups == 1:
            # As a product for each clip here, too: a mixture of kernels costs less than four products.
            weights = (mixture @ kernels.flatten(1)).view(-1, *self.kernel_shape[:2])  # (batch, out, in)
            return (weights @ maps.flatten(2)).unflatten(2, maps.shape[2:])
        results = [
            F.conv2d(maps, kernel, None, self.stride, self.padding, self.dilation, self.groups) for kernel in kernels
        ]  # each (batch, out_channels, mels, frames)
        shares = mixture[..., None, None, None].unbind(1)  # each (batch, 1, 1, 1)
        return torch.stack([share * result for share, result in zip(shares, results, strict=True)]).sum(dim=0)


class DynamicReLU(nn.Module):
    """The largest of a few straight lines, whose slopes and heights follow from the context (Equation 4)."""

    lambdas: Tensor
    init_v: Tensor

    def __init__(self, channels: int, context_size: int, lines: int = 2) -> None:
        super().__init__()
        self.channels, self.lines = channels, lines
        self.coef_net = nn.Sequential(nn.Linear(context_size, 2 * lines * channels))
        # Constants, but the released checkpoints hold them: how far slopes and heights may move, and from where.
        self.register_buffer("lambdas", torch.tensor([1.0] * lines + [0.5] * lines))
        self.register_buffer("init_v", torch.tensor([1.0] + [0.0] * (2 * lines - 1)))

    def forward(self, maps: Tensor, context: Context) -> Tensor:
        """Activate (batch, channels, mels, frames); the shape stays."""
        moves = 2 * self.coef_net(context.summary).sigmoid() - 1  # (batch, channels * 2 * lines)
        coefficients = moves.view(maps.shape[0], self.channels, 1, 1, 2 * self.lines) * self.lambdas + self.init_v
        slopes, heights = coefficients.to(maps.dtype).split(self.lines, dim=-1)
        result = maps * slopes[..., 0] + heights[..., 0]
        for line in range(1, self.lines):
            result = torch.maximum(result, maps * slopes[..., line] + heights[..., line])
        return result


class CoordinateAttention(nn.Module):
    """Weighs every band and every frame of every channel."""

    def forward(self, maps: Tensor, context: Context) -> Tensor:
        """Gate (batch, channels, mels, frames); the shape stays."""
        return maps * context.mels.sigmoid() * context.frames.sigmoid()


class Static(nn.Module):
    """Lets an ordinary layer stand where a dynamic one is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, maps: Tensor, context: Context) -> Tensor:
        """Apply the layer and leave the context aside."""
        return self.module(maps)
