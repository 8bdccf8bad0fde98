"""The one training loop: batches in, step reports out. Both training commands are settings around it.

Everything random in a step comes from (seed, step): which clips, how they are mixed, jitter, patchout, dropout. So the
state of a run is its weights, its optimizer and a step number, and a run that goes on from them repeats exactly what
an uninterrupted one would have done.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.cache import GIGABYTE, CacheFolder
from pipeline.errors import UsageError
from pipeline.join import TrainingBatch
from pipeline.manifest import Manifest
from pipeline.sampling import EpochPlan, Sampling, StreamConfig, seed_for
from pipeline.storage import local_path


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become steps."""

    kind: Literal["adam", "adamw"] = "adam"
    """adamw takes the weight decay out of the gradient's scaling."""
    weight_decay: float = 0.0
    """Share of a weight that decays each step, times the learning rate; 0 or more."""
    reference_batch: int = 120
    """Batch size, in clips, that the learning rate is meant for; other batch sizes scale it in proportion."""
    most_gradient_norm: float | None = None
    """Gradients longer than this (Euclidean norm over all weights) are shortened to it; without it, never."""

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or self.reference_batch < 1:
            raise UsageError("optimizer: weight_decay must be 0 or more and reference_batch 1 or more")
        if self.most_gradient_norm is not None and not self.most_gradient_norm > 0:
            raise UsageError(f"optimizer.most_gradient_norm is {self.most_gradient_norm}; choose a value above 0")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What every training run needs; the two training commands add their own settings."""

    data: str
    """Dataset to learn from: a folder or URL with a manifest."""
    eval_data: str | None = None
    """Dataset to evaluate on; without it nothing is evaluated and no best checkpoint is chosen."""
    run: str
    """Folder or URL that receives the run: settings, metrics, checkpoints, weights."""
    resume: bool = False
    """Go on with the run in the folder, exactly where its newest sound checkpoint left it."""
    checkpoint: str | None = None
    """Weights to start from: a file or URL; without it the weights are drawn from the seed."""
    prior_bias: bool = False
    """Start the last layer's biases at the log-odds of the classes' shares in the dataset instead of 0, so that a short
    run need not spend its first epochs on learning that most classes are rare."""
    epochs: int = 200
    """Length of the run, in epochs."""
    clips_per_epoch: int = 100_000
    """Clips drawn for an epoch, without replacement, in whole batches; a smaller dataset gives all it has."""
    sampling: Sampling = "balanced"
    """balanced: clips of rare classes are drawn more often, clips without labels never. uniform: all alike. stream:
    whole shards are read from start to end, and clips kept by their weight; for stores where every seek is dear."""
    read_window: int = 0
    """Clips of an epoch that are read in the order in which they lie, window after window: fewer and shorter seeks, but
    neighbours in a shard meet in one batch. 0 reads in the order of the draws. Which clips are drawn stays the same."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """With --sampling stream: how shards are gone through."""
    batch_size: int = 120
    """Clips a step."""
    learning_rate: float = 8e-4
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Weight averaging."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; weights, front end and loss stay float32."""
    channels_last: bool = False
    """Lay images out with the channels innermost, which convolutions on most machines prefer."""
    seed: int = 0
    """Decides everything random, 0 or more."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    workers: int = 4
    """Processes that read and decode, at most one a core; 0 decodes between the steps. The result is the same."""
    cache: Annotated[str, Parameter(name=("--cache-dir", "--cache"))] = "~/.cache/audioset-distill"
    """Local folder for what can be made or fetched again: aligned logits (2 bytes a clip and class), clips of remote
    datasets, decoded audio. Several runs may share it."""
    cache_size: float = 100.0
    """Most that folder may hold, in GB, above 0; what was not used for longest goes first, never what a run uses."""
    cache_audio: bool = False
    """Keep decoded audio in the cache (1.3 MB a clip of 10 s at 32 kHz), so that each clip is decoded only once."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the clips that may be unreadable."""
    evaluate_every: int = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints, in minutes; 0 saves after every step."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep, 1 or more; the newest are kept."""
    log_every: int = 50
    """Steps from one line of metrics to the next."""

    def __post_init__(self) -> None:
        counts = ("epochs", "clips_per_epoch", "batch_size", "evaluate_every", "keep_checkpoints", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 1 or more")
        for name in ("seed", "workers", "checkpoint_minutes", "read_window"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.sampling == "stream" and self.read_window:
            raise UsageError("read_window is of no use with --sampling stream, which reads whole shards; leave it out")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")
        if not self.cache_size > 0:
            raise UsageError(f"cache_size is {self.cache_size}; choose a value above 0, in GB")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; choose a value above 0")

    def cache_folder(self) -> CacheFolder:
        """Give the cache that `cache` and `cache_size` describe."""
        return CacheFolder(local_path(self.cache), self.cache_size * GIGABYTE)


class Learner(Protocol):
    """What a training command brings to the loop."""

    @property
    def model(self) -> nn.Module:
        """The network, with its `front_end`, on the run's device."""
        ...

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Give a batch's loss, a scalar. `network` is the model as the loop wraps it; all chance is the generator's."""
        ...

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Judge predictions, both (clips, classes); the entry `mAP` decides which weights are the best."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps so far, this one included."""
    epoch: int
    """From 0."""
    clips: int
    """Clips that it learned from."""
    loss: float
    """Mean over those clips, in nats; 0 where none could be decoded and nothing was learned."""
    gradient_norm: float
    """Euclidean norm over all weights, before any shortening."""
    learning_rate: float
    ends_epoch: bool
    """Whether it was the last of its epoch."""


class Trainer:
    """A model in training: takes steps, and can be saved and restored between any two of them.

    Args:
        learner: the model and its loss.
        config: the settings.
        plan: which clips each step sees.
        schedule: epoch → what the learning rate is multiplied by.
        device: where the model is.
    """

    def __init__(
        self,
        learner: Learner,
        config: TrainingConfig,
        plan: EpochPlan,
        schedule: Callable[[int], float],
        device: torch.device,
    ) -> None:
        self.step = 0
        self._learner, self._config, self._plan = learner, config, plan
        self._schedule, self._device = schedule, device
        self._peak = config.learning_rate * config.batch_size / config.optimizer.reference_batch
        self._model = learner.model.to(device)
        if config.channels_last:
            self._model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._optimizer = _build_optimizer(self._model, config.optimizer)
        self._average = _build_average(self._model, config.average)

    @property
    def trained_model(self) -> nn.Module:
        """The weights to evaluate and to save: the average where there is one by now, or else the last."""
        if self._average is not None and int(self._average.n_averaged) > 0:
            return self._average.module
        return self._model

    def steps(self, batches: Iterable[TrainingBatch]) -> Iterator[StepReport]:
        """Train on the batches of `plan.batches(self.step)`.

        Raises:
            FloatingPointError: a loss or a gradient is not finite. The weights are those before that step.
        """
        for batch in batches:
            yield self._take(batch)

    def _take(self, batch: TrainingBatch) -> StepReport:
        epoch = self._plan.epoch_of(self.step)
        learning_rate = self._peak * self._schedule(epoch)
        batch = batch.only_valid().to(self._device)
        loss, norm = self._learn(batch, learning_rate) if len(batch) else (0.0, 0.0)
        self.step += 1
        ends_epoch = self.step % self._plan.steps_per_epoch == 0
        if self._average is not None and (
            self._config.average.kind == "ema" or (ends_epoch and self._config.average.counts_epoch(epoch))
        ):
            self._average.update_parameters(self._model)
        return StepReport(
            step=self.step,
            epoch=epoch,
            clips=len(batch),
            loss=loss,
            gradient_norm=norm,
            learning_rate=learning_rate,
            ends_epoch=ends_epoch,
        )

    def _learn(self, batch: TrainingBatch, learning_rate: float) -> tuple[float, float]:
        """Make one optimizer step; give the loss and the gradient's norm."""
        config = self._config
        torch.manual_seed(seed_for(config.seed, self.step, 0))  # dropout can draw from the global generator only
        generator = torch.Generator().manual_seed(seed_for(config.seed, self.step, 1))
        self._model.train()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = self._learner.loss(self._model, batch, generator)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
        norm = get_total_norm(gradients)
        if config.optimizer.most_gradient_norm is not None:
            clip_grads_with_norm_(self._model.parameters(), config.optimizer.most_gradient_norm, norm)
        loss_value, norm_value = torch.stack([loss.detach().float(), norm.float()]).tolist()
        # Never a step with what is not finite: from then on every weight would be lost, and so would the checkpoints.
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise FloatingPointError(f"the loss is {loss_value} and the norm of its gradient {norm_value}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return loss_value, norm_value

    def state_dict(self) -> dict[str, Any]:
        """Give all that a later process needs to go on: tensors and plain values."""
        return {
            "step": self.step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            RuntimeError: it belongs to another model.
        """
        self.step = state["step"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])


@torch.no_grad()
def start_at_class_shares(model: nn.Module, manifest: Manifest) -> None:
    """Set the last layer's biases so that an untrained model gives each class the probability it has in the dataset.

    Args:
        model: has timm's `get_classifier`.
        manifest: the dataset. A class that no clip has counts as half a clip, for it may come up elsewhere.

    Raises:
        UsageError: the model's last layer has no bias for each class.
    """
    classifier: nn.Module = model.get_classifier()  # pyright: ignore[reportCallIssue]
    shape = (len(manifest.vocabulary),)
    biases = [bias for name, bias in classifier.named_parameters() if name.endswith("bias") and bias.shape == shape]
    if not biases:
        raise UsageError("--prior-bias: this model's last layer has no bias for each class; leave it out")
    shares = torch.from_numpy((manifest.label_counts() + 0.5) / (len(manifest) + 1))  # (classes,)
    biases[-1].copy_(torch.logit(shares))


def _build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[config.kind](model.parameters(), weight_decay=config.weight_decay, fused=True)


def _build_average(model: nn.Module, config: AverageConfig) -> AveragedModel | None:
    if config.kind == "none":
        return None
    # Batch statistics are not averaged but copied: they already are running means.
    mean = get_ema_multi_avg_fn(config.decay) if config.kind == "ema" else None
    return AveragedModel(model, multi_avg_fn=mean, use_buffers=False)
