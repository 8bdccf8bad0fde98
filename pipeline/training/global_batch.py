"""Layers over the global batch, of which a process holds a part: batch norm and dropout.

They take the place of torch's own inside a model, under the same names, so checkpoints fit either way.
"""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchDropout(nn.Dropout):
    """Dropout whose mask is drawn for the global batch, so that it does not matter which part of it is at hand."""

    _seed = 0
    _positions: Tensor | None = None
    _global_batch_size = 0

    def draw_for(self, seed: int, positions: Tensor, global_batch_size: int) -> None:
        """Set which clips come next.

        Args:
            seed: of this layer in this step.
            positions: (batch,), int64: where the clips stand in the global batch.
            global_batch_size: clips of the global batch.
        """
        self._seed, self._positions, self._global_batch_size = seed, positions, global_batch_size

    def forward(self, input: Tensor) -> Tensor:
        """Drop from (batch, …); the shape stays."""
        return input * self._kept(input) if self.training else input  # pyright: ignore

    @torch.compiler.disable
    def _kept(self, features: Tensor) -> Tensor:
        assert self._positions is not None, "draw_for comes before a training step"
        generator = torch.Generator(features.device).manual_seed(self._seed)
        drawn = torch.rand(self._global_batch_size, *features.shape[1:], generator=generator, device=features.device)
        if len(self._positions) < self._global_batch_size:  # or else they are all there, in their order
            drawn = drawn[self._positions.to(features.device)]
        kept = drawn >= self.p  # (batch, …)
        return kept.to(features.dtype) / (1 - self.p)


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the clips of all processes, on CPUs: what torch's `SyncBatchNorm` is on GPUs.

    Mean and variance are summed over the processes, gradients too, so that dividing the batch changes nothing.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # whatever the layer in whose place this one stands has taken

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, …); the shape stays."""
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        rows = input.float().movedim(1, -1).flatten(0, -2)  # (batch * pixels, channels)
        count = _sum_over_ranks(torch.tensor([float(len(rows))]))
        mean = _sum_over_ranks(rows.sum(dim=0)) / count  # (channels,)
        centred = rows - mean
        variance = _sum_over_ranks(centred.square().sum(dim=0)) / count  # (channels,)
        self._remember(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        normal = centred * (variance + self.eps).rsqrt()
        if self.affine:
            normal = normal * self.weight + self.bias
        shape = (input.shape[0], *input.shape[2:], input.shape[1])
        return normal.view(shape).movedim(-1, 1).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _sum_over_ranks(value: Tensor) -> Tensor:
    return all_reduce(value)  # pyright: ignore[reportReturnType]


def convert_dropout(model: nn.Module) -> list[GlobalBatchDropout]:
    """Turn each dropout that drops anything into `GlobalBatchDropout`; return those layers, in order."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Dropout and layer.p > 0]
    for layer in layers:
        layer.__class__ = GlobalBatchDropout
    return layers  # pyright: ignore[reportReturnType]


def convert_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Turn each batch norm of a model into one over the global batch: on GPUs, torch's `SyncBatchNorm`."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = GlobalBatchNorm
