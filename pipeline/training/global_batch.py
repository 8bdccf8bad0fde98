"""Layers over the global batch, of which a process holds a part: batch norm and dropout.

They take the place of torch's own inside a model, under the same names, so checkpoints fit either way. None of them
makes a GPU's host wait, nor asks it for a number that changes from step to step: a step can be compiled, and captured.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchDropout(nn.Dropout):
    """Dropout whose mask is drawn for the global batch, so that it does not matter which part of it is at hand.

    The mask is drawn before a step, outside of what is compiled, once the layer has seen a clip's features.
    """

    _seed = 0
    _positions: Tensor | None = None
    _global_batch_size = 0
    _kept: Tensor | None = None

    def draw_for(self, seed: int, positions: Tensor, global_batch_size: int) -> None:
        """Set which clips come next.

        Args:
            seed: of this layer in this step.
            positions: (batch,), int64, on the model's device: where the clips stand in the global batch.
            global_batch_size: clips of the global batch.
        """
        self._seed, self._positions, self._global_batch_size = seed, positions, global_batch_size
        if self._kept is not None:
            self._kept = self._draw(self._kept.shape[1:])

    def forward(self, input: Tensor) -> Tensor:
        """Drop from (batch, …); the shape stays."""
        if not self.training:
            return input
        kept = self._kept
        if kept is None or kept.shape[1:] != input.shape[1:]:
            self._kept = kept = self._draw(input.shape[1:])
        return input * (kept.to(input.dtype) / (1 - self.p))

    def _draw(self, shape: torch.Size) -> Tensor:
        assert self._positions is not None, "draw_for comes before a training step"
        device = self._positions.device
        generator = torch.Generator(device).manual_seed(self._seed)
        drawn = torch.rand(self._global_batch_size, *shape, generator=generator, device=device)
        if len(self._positions) < self._global_batch_size:  # or else they are all there, in their order
            drawn = drawn[self._positions]
        return drawn >= self.p  # (batch, …)


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the clips of all processes: torch's `SyncBatchNorm` on any device, without its waits.

    Mean and variance are combined over the processes in one exchange, and the sums that the gradients need in another,
    so that dividing the batch changes nothing. `SyncBatchNorm` looks for processes without clips, for which its host
    waits three times in each layer; here each process has a clip.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # whatever the layer in whose place this one stands has taken

    @torch.compiler.disable  # collectives of a custom gradient; with one process nothing of this is called
    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, …); the shape stays."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        return _GlobalNorm.apply(input, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps)  # pyright: ignore[reportReturnType]


class WeightedBatchNorm(_BatchNorm):
    """Batch norm over the clips that count, where others only keep the batch's shape; for networks that are compiled.

    It is written in operators that a compiler fuses; one by one they would take several times as long as torch's own.
    """

    _weights: Tensor | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def weigh(self, weights: Tensor | None) -> None:
        """Set which clips come next: (batch,), float32, 1 for those that count, 0 for others; None: all count."""
        self._weights = weights

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, …); the shape stays."""
        if not self.training or self._weights is None:
            return super().forward(input)
        maps, axes = _wide(input), _all_but_channels(input)
        weights = self._weights.to(maps.dtype).view(-1, *[1] * (input.dim() - 1))  # (batch, 1, …)
        count = weights.sum() * (input[0].numel() // input.shape[1])
        mean = (maps * weights).sum(axes) / count  # (channels,)
        centred = maps - _spread(mean, maps)
        variance = (centred.square() * weights).sum(axes) / count  # (channels,)
        self._remember(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        normal = centred * _spread((variance + self.eps).rsqrt(), maps)
        if self.affine:
            normal = normal * _spread(self.weight, maps) + _spread(self.bias, maps)
        return normal.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _GlobalNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        maps, ops = _dense(maps), _operators(maps)
        mean, invstd = ops.batch_norm_stats(maps, eps)  # (channels,) each
        count = torch.full((1,), maps.numel() / maps.shape[1], dtype=mean.dtype, device=mean.device)
        channels, all_ranks = len(mean), mean.new_zeros(dist.get_world_size(), 2 * len(mean) + 1)
        all_ranks[dist.get_rank()] = torch.cat([mean, invstd, count])
        dist.all_reduce(all_ranks)  # each rank's row
        means, invstds, counts = all_ranks.split([channels, channels, 1], dim=1)
        counts = counts.flatten()  # (ranks,)
        mean, invstd = ops.batch_norm_gather_stats_with_counts(
            maps, means.contiguous(), invstds.contiguous(), running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(maps, weight, mean, invstd, counts.to(torch.int32))
        return ops.batch_norm_elemt(maps, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, invstd, counts = ctx.saved_tensors
        gradient, ops, wanted = _dense(gradients[0]), _operators(maps), ctx.needs_input_grad[:3]
        *sums, for_weight, for_bias = ops.batch_norm_backward_reduce(gradient, maps, mean, invstd, weight, *wanted)
        for_maps = None
        if wanted[0]:
            both = torch.stack(sums)  # (2, channels): of the gradient, and of its product with the centred maps
            dist.all_reduce(both)
            for_maps = ops.batch_norm_backward_elemt(gradient, maps, mean, invstd, weight, both[0], both[1], counts)
        # Weight and bias are summed with all others', by whoever sums those.
        return for_maps, for_weight if wanted[1] else None, for_bias if wanted[2] else None, None, None, None, None


def _dense(maps: Tensor) -> Tensor:
    return maps if maps.is_contiguous(memory_format=torch.channels_last) else maps.contiguous()


def _operators(maps: Tensor) -> Any:
    """Returns who has the five operators: torch on its CUDA devices, in kernels for either layout; elsewhere we do."""
    return torch if maps.is_cuda else _Operators


class _Operators:
    """What torch has for CUDA alone: same names, arguments and results; maps are (batch, channels, …)."""

    @staticmethod
    def batch_norm_stats(maps: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(_wide(maps), _all_but_channels(maps), correction=0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        maps: Tensor,
        means: Tensor,
        invstds: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shares, count = (counts / counts.sum())[:, None], counts.sum()
        mean = (shares * means).sum(dim=0)
        variance = (shares * (invstds**-2 - eps + (means - mean) ** 2)).sum(dim=0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(
        maps: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        slope = invstd if weight is None else invstd * weight
        normal = (_wide(maps) - _spread(mean, maps)) * _spread(slope, maps)
        return (normal if bias is None else normal + _spread(bias, maps)).to(maps.dtype)

    @staticmethod
    def batch_norm_backward_reduce(
        gradient: Tensor,
        maps: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        for_maps: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradient, axes = _wide(gradient), _all_but_channels(maps)
        total = gradient.sum(axes)
        with_centred = (gradient * (_wide(maps) - _spread(mean, maps))).sum(axes)
        return total, with_centred, with_centred * invstd, total

    @staticmethod
    def batch_norm_backward_elemt(
        gradient: Tensor,
        maps: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        total: Tensor,
        with_centred: Tensor,
        counts: Tensor,
    ) -> Tensor:
        count = counts.sum()
        slope = invstd if weight is None else invstd * weight
        centred = _wide(maps) - _spread(mean, maps)
        rest = _spread(total / count, maps) + centred * _spread(invstd**2 * with_centred / count, maps)
        return ((_wide(gradient) - rest) * _spread(slope, maps)).to(gradient.dtype)


def _wide(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()


def _all_but_channels(maps: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis in range(maps.dim()) if axis != 1)


def _spread(values: Tensor, maps: Tensor) -> Tensor:
    return values.view(-1, *[1] * (maps.dim() - 2))  # (channels, 1, …)


def convert_dropout(model: nn.Module) -> list[GlobalBatchDropout]:
    """Turn each dropout that drops anything into `GlobalBatchDropout`; return those layers, in order."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Dropout and layer.p > 0]
    for layer in layers:
        layer.__class__ = GlobalBatchDropout
    return layers  # pyright: ignore[reportReturnType]


Norm = TypeVar("Norm", GlobalBatchNorm, WeightedBatchNorm)


def convert_batch_norm(model: nn.Module, kind: type[Norm]) -> list[Norm]:
    """Turn each batch norm of a model into one of another kind; return those layers, in order."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.__class__ = kind
    return layers  # pyright: ignore[reportReturnType]
