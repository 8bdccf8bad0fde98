"""How gradients become steps, and steps an average of the weights: settings, and torch's parts for them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become steps."""

    kind: Literal["adam", "adamw"] = "adam"
    """adamw takes the weight decay out of the gradient's scaling."""
    weight_decay: float = 0.0
    """Share of a weight that decays each step, times the learning rate; 0 or more."""
    reference_batch: int = 120
    """Batch size, in clips, that the learning rate is meant for; other batch sizes scale it in proportion."""
    max_gradient_norm: float | None = None
    """Gradients longer than this (Euclidean norm over all weights) are shortened to it; without it, never."""

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or self.reference_batch < 1:
            raise UsageError("optimizer: weight_decay must be 0 or more and reference_batch 1 or more")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise UsageError(f"optimizer.max_gradient_norm is {self.max_gradient_norm}; choose a value above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageConfig:
    """Averages of the weights along the run, which are then evaluated and saved instead of the last weights."""

    kind: Literal["none", "ema", "swa"] = "none"
    """ema: a running mean that forgets, updated every step. swa: the plain mean over some epochs' ends."""
    decay: float = 0.999
    """ema: share of the mean that a step keeps, 0 to 1."""
    start_epoch: int = 50
    """swa: first epoch, from 0, whose end counts."""
    every_epochs: int = 5
    """swa: epochs from one that counts to the next."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError(f"average.decay is {self.decay}; choose a value from 0 to below 1")
        if self.start_epoch < 0 or self.every_epochs < 1:
            raise UsageError("average: start_epoch must be 0 or more and every_epochs 1 or more")

    def counts_epoch(self, epoch: int) -> bool:
        """Whether the end of `epoch` enters the plain mean."""
        return self.kind == "swa" and epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every_epochs == 0

    def counts_step(self, epoch: int, ends_epoch: bool) -> bool:
        """Whether the weights after a step enter the mean."""
        return self.kind == "ema" or (ends_epoch and self.counts_epoch(epoch))


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a learner's groups of parameters; its kernels are fused."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[config.kind](groups, fused=True)


def build_average(model: nn.Module, config: AverageConfig) -> AveragedModel | None:
    """Build the average of a model's weights, or None where the last weights are taken."""
    if config.kind == "none":
        return None
    if config.kind == "ema":
        return _RunningMean(model, multi_avg_fn=get_ema_multi_avg_fn(config.decay))
    return AveragedModel(model)


class _RunningMean(AveragedModel):
    """Goes on by a few kernels for all weights, and copies nothing from the host, which torch's own does every step.

    Batch statistics are not averaged but copied: they already are running means.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights after a step."""
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if int(self.n_averaged) and self.multi_avg_fn is not None:
            self.multi_avg_fn(ours, theirs, self.n_averaged)
        else:
            torch._foreach_copy_(ours, theirs)
        buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        for dtype in {buffer.dtype for buffer, _ in buffers}:  # those of one are copied at once
            its_own, its_source = zip(*(pair for pair in buffers if pair[0].dtype == dtype), strict=True)
            torch._foreach_copy_(its_own, its_source)
        self.n_averaged += 1
