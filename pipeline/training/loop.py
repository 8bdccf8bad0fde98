"""The one training loop: batches in, step reports out. All training commands are settings around it.

Everything random in a step comes from (seed, step) and a clip's position in the global batch: which clips, how they are
mixed, jitter, patchout, dropout. So the state of a run is its weights, its optimizer and a step number. A run that goes
on from them repeats exactly what an uninterrupted one would have done, and it does not matter among how many processes,
or into how many micro-batches, a batch is divided.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import student
from pipeline.batches.join import MAX_SCORED, TrainingBatch
from pipeline.batches.sampling import EpochSampler, Sampling, StreamConfig, seed_for
from pipeline.errors import UsageError
from pipeline.models.device import (
    Precision,
    PrecisionChoice,
    autocast,
    compute_in,
    tensor_dtype,
    training_precision,
)
from pipeline.models.hearing import noise_features
from pipeline.models.transfer import DeviceCopies, LateNumbers
from pipeline.runtime.ray_address import check_address
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.storage.cache import GIGABYTE, CacheFolder
from pipeline.storage.files import local_path
from pipeline.training.compiled_network import (
    MAX_DEVIATION,
    check_compiler,
    compile_network,
    deviation,
    pays_to_compile,
)
from pipeline.training.divided_network import divide_among_ranks
from pipeline.training.global_batch import WeightedBatchNorm, convert_batch_norm, convert_dropout
from pipeline.training.optimizing import AverageConfig, OptimizerConfig, build_average, build_optimizer
from pipeline.training.ranks import Ranks

_log = logging.getLogger(__name__)


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
    """Start the last layer's biases at the log-odds of the classes' shares in what is learned, labels and the teachers'
    probabilities, instead of 0, so that a short run need not spend its first epochs on learning that most classes are
    rare."""
    epochs: int = 200
    """Length of the run, in epochs."""
    clips_per_epoch: int = 100_000
    """Clips drawn for an epoch, without replacement, in whole batches; a smaller dataset gives all it has."""
    sampling: Sampling = "balanced"
    """balanced: clips of rare classes are drawn more often, those on which nothing is to be heard never, those whose
    labels are unknown as often as others on average. uniform: all alike. stream: whole shards are read from start to
    end, and clips kept by their weight; for stores where every seek is dear."""
    read_window: int = 0
    """Clips of an epoch that are read in the order in which they lie, window after window: fewer and shorter seeks, but
    neighbours in a shard meet in one batch. 0 reads in the order of the draws. Which clips are drawn stays the same."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """With --sampling stream: how shards are gone through."""
    batch_size: int = 120
    """Clips a step, over all ranks together."""
    accumulate: int = 1
    """Micro-batches that each rank takes its part of a batch in, one after the other, where a GPU's memory is short: 1
    or more. The step is the same, but that batch norms see one micro-batch at a time."""
    learning_rate: float = 8e-4
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Weight averaging."""
    precision: PrecisionChoice = "auto"
    """What the network computes in; weights, front end and loss stay float32. float16 scales the loss, and skips
    the steps in which a scaled gradient overflows. auto is what a resumed run was begun in, or else bfloat16 on GPUs
    that have instructions for it, and float32 elsewhere."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time, which are slower; a run that is resumed is then the run
    that was not stopped. On a CPU it is so anyway."""
    channels_last: bool = False
    """Lay images out with the channels innermost, which convolutions on most machines prefer."""
    compile: bool | None = None
    """Let torch.compile translate the network first: minutes of preparation, then faster steps. Needs a compiler. By
    default long runs of a student on one GPU do, where that works and gives the same gradient within rounding."""
    sync_batch_norm: bool = True
    """With several ranks: batch norms see the global batch, not each rank its share. Off is faster, but the result then
    depends on the number of ranks."""
    seed: int = 0
    """Decides everything random, 0 or more."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""
    ranks: int = 1
    """Processes that train together, one a GPU, started by Ray Train. Leave it at 1 under torchrun, which has its own
    --nproc-per-node. The clips of a step are the same."""
    max_restarts: int = 3
    """With --ranks: how often all ranks are started again, from the newest checkpoint, where one of them or its machine
    is lost; 0 or more. torchrun has its own --max-restarts."""
    address: str | None = None
    """With --ranks: the Ray cluster to train on, such as auto; without it Ray runs on this machine."""
    workers: int | None = None
    """Processes that read and decode for each rank, at most one a core; 0 decodes between the steps. By default one for
    each core of a GPU's rank, and up to 4 without a GPU. The result is the same."""
    patience: float = PATIENCE_SECONDS
    """How long a decoding process or another rank may be without a sign of life, in seconds, above 0; then the run is
    saved and ends. Every clip that is begun is one, and of a rank that it computes."""
    cache: Annotated[str, Parameter(name=("--cache-dir", "--cache"))] = "~/.cache/audioset-distill"
    """Local folder for what can be made or fetched again: aligned logits (2 bytes a clip and class), clips of remote
    datasets, decoded audio. Several runs may share it."""
    cache_size: float = 100.0
    """Most that folder may hold, in GB, above 0; what was not used for longest goes first, never what a run uses."""
    cache_audio: bool = False
    """Keep decoded audio in the cache, so that each clip is decoded only once: in 16 bits (0.64 MB a clip of 10 s at
    32 kHz), to which other sound is rounded. Where there is no room for all clips, a share of them is kept."""
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
        counts = ("epochs", "clips_per_epoch", "batch_size", "accumulate", "ranks")
        for name in (*counts, "evaluate_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 1 or more")
        for name in ("seed", "workers", "checkpoint_minutes", "read_window", "max_restarts"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.sampling == "stream" and self.read_window:
            raise UsageError("read_window is of no use with --sampling stream, which reads whole shards; leave it out")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")
        if not self.patience > 0:
            raise UsageError(f"patience is {self.patience}; choose a number of seconds above 0")
        if not self.cache_size > 0:
            raise UsageError(f"cache_size is {self.cache_size}; choose a value above 0, in GB")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; choose a value above 0")
        check_address(self.address)

    def cache_folder(self) -> CacheFolder:
        """Returns the cache that `cache` and `cache_size` describe."""
        return CacheFolder(local_path(self.cache), self.cache_size * GIGABYTE)


class Learner(ABC):
    """What a training command brings to the loop: a model, what it is to learn, and how it is scored.

    Args:
        model: the network, with its `front_end`.
    """

    weighs_clips = False
    """Whether `loss` minds a batch's `clip_weights`: batches may then keep their shape, as compiled networks want it,
    whatever clips could not be decoded. Others get the clips that could."""
    best_metric = "mAP"
    """The entry of `score` that decides which weights are the best ones; higher is better."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Returns the mean loss of a batch's clips, a scalar.

        Args:
            network: the model as the loop wraps it; call it once.
            batch: on the model's device; perhaps a part of the global batch, see its `positions`.
            generator: all randomness comes from it. It starts alike for all parts of a global batch, so what is drawn
                for clips must be drawn for the global batch.
        """

    @abstractmethod
    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        """Returns metrics of predictions; the entry that `best_metric` names decides.

        Args:
            logits: (clips, classes).
            labels: (clips, classes), 0 or 1.
            label_mask: (clips, classes) bool, False where the label is unknown; None where all are known.
        """

    @abstractmethod
    def model_metadata(self) -> dict[str, Any]:
        """Returns stage, model and kwargs: how a file of weights says what it is for."""

    def begin_epoch(self, network: nn.Module, epoch: int) -> None:  # noqa: B027 (most have nothing to set)
        """Set what depends on the epoch, from 0, in the model or in an average of it; by default nothing does."""

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Divide the weights into groups for the optimizer; a group's `lr_scale` multiplies its learning rate."""
        return [{"params": list(self.model.parameters()), "weight_decay": config.weight_decay}]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps so far, this one included."""
    epoch: int
    """From 0."""
    clips: int
    """Clips that it learned from, over all ranks."""
    learning_rate: float
    ends_epoch: bool
    """Whether it was the last of its epoch."""
    numbers: LateNumbers
    """Loss and gradient norm, perhaps still on their way from a GPU."""

    @property
    def loss(self) -> float:
        """Mean over those clips, in nats; 0 where none could be decoded and nothing was learned."""
        return self.numbers.read()[0]

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm over all weights, before clipping; infinite or no number in a step that was skipped."""
        return self.numbers.read()[1]

    @property
    def skipped(self) -> bool:
        """Whether a gradient scaled for float16 overflowed, so that no weight was changed."""
        return not math.isfinite(self.gradient_norm)


class Trainer:
    """A model in training: takes steps, and can be saved and restored between any two of them.

    Args:
        learner: the model and its loss.
        config: the settings.
        sampler: which clips each step takes.
        schedule: epoch → what the learning rate is multiplied by.
        device: where the model goes.
        ranks: the processes that train it together.

    Raises:
        UsageError: the batch is too small to be divided, or the network can't be compiled here.
    """

    def __init__(
        self,
        learner: Learner,
        config: TrainingConfig,
        sampler: EpochSampler,
        schedule: Callable[[int], float],
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.step = 0
        self.skipped_steps = 0
        """Steps so far whose gradient overflowed."""
        self._learner, self._config, self._sampler = learner, config, sampler
        self._schedule, self._device, self._ranks = schedule, device, ranks or Ranks()
        self._micro_batches = self._ranks.micro_batches(config.batch_size, config.accumulate)
        if (config.batch_size + 1) // 2 < self._ranks.world_size * config.accumulate:
            raise UsageError(
                f"batch_size is {config.batch_size}: too small for {self._ranks.world_size} ranks x "
                f"{config.accumulate} micro-batches of two clips or more. Choose a larger --batch-size or a smaller "
                "--accumulate"
            )
        self._peak = config.learning_rate * config.batch_size / config.optimizer.reference_batch
        self._model = learner.model.to(device)
        self._precision: Precision = training_precision(config.precision, device)
        compute_in(self._precision, [self._model])
        if config.channels_last:
            self._model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._copies = DeviceCopies(device)
        # Ranks have to know that a step's collectives gave what is true, and float16 whether its scale was too large.
        self._settles_late = device.type == "cuda" and self._ranks.world_size == 1 and self._precision != "float16"
        self._unsettled: StepReport | None = None
        self._lost: Tensor | None = None
        self._average = build_average(self._model, config.average)
        compiled = config.compile
        fits = learner.weighs_clips and self._ranks.world_size == 1
        if compiled is None:
            steps = config.epochs * sampler.steps_per_epoch
            compiled = pays_to_compile(device, steps=steps, keeps_shape=fits)
        self._keeps_shape = compiled and fits
        self._norms = convert_batch_norm(self._model, WeightedBatchNorm) if self._keeps_shape else []
        self._network = self._wrap(self._model, compiled=compiled)
        self._is_warm = False
        self._dropouts = convert_dropout(self._model)
        self._optimizer = build_optimizer(learner.parameter_groups(config.optimizer), config.optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "float16")
        self._begin_epoch(0)

    def _wrap(self, model: nn.Module, *, compiled: bool) -> nn.Module:
        """Returns the model as a step runs it: divided among the ranks, and compiled."""
        config, network = self._config, model
        if config.compile:
            check_compiler(self._device)
        if self._ranks.world_size > 1:
            with self._ranks.collectives():
                network = divide_among_ranks(model, self._device, sync_batch_norm=config.sync_batch_norm)
        if not compiled:
            return network
        at_once = config.accumulate == 1
        return compile_network(network, self._device, keeps_shape=self._keeps_shape, at_once=at_once)

    def warm_up(self) -> None:
        """Let a GPU load and choose its kernels, and the compiler work, while the first batch is still on its way.

        Nothing is learned, and nothing that is random moves on. Where the settings leave it open whether to compile, a
        compiled network that fails, or whose gradient is another, is given up. Several ranks begin cold.

        Raises:
            UsageError: the network is to be compiled, and its gradient is another then.
        """
        if self._is_warm or self._ranks.world_size > 1:
            return
        self._is_warm = True
        first, device = self._micro_batches[0], self._device
        if device.type == "cuda" and self._keeps_shape and not self._config.deterministic:
            torch.backends.cudnn.benchmark = True  # each shape is measured once
        self._model.train()
        clips = first.stop - first.start
        features = noise_features(self._model, clips)
        weights = torch.ones(clips, device=device) if self._keeps_shape else None
        self._set_clips(torch.arange(clips, device=device), weights, clips)
        try:
            found = deviation(self._model, self._network, features, self._run)
            close = found <= MAX_DEVIATION[tensor_dtype(self._precision)]
            problem = "" if close else f"its gradient is {100 * found:.0f} % off"
        except Exception as error:  # whatever a compiler raises
            if self._network is self._model or self._config.compile:
                raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            self._give_up_compiling(problem)
        with torch.inference_mode():  # what an evaluation will want
            self._run(self._model.eval(), features[:MAX_SCORED])

    def _give_up_compiling(self, problem: str) -> None:
        if self._config.compile:
            raise UsageError(f"--compile: the compiled network computes something else ({problem}); leave it out")
        _log.warning("the network is not compiled, which would make its steps faster: %s", problem)
        self._network, self._keeps_shape = self._model, False

    def _run(self, network: nn.Module, features: Tensor) -> Tensor:
        with autocast(self._device.type, self._precision):
            return network(features)

    def _set_clips(self, positions: Tensor, weights: Tensor | None, global_batch_size: int) -> None:
        """Tell the layers which clips come next: (batch,) each, on the device; see `TrainingBatch`."""
        for number, layer in enumerate(self._dropouts):
            layer.draw_for(seed_for(self._config.seed, self.step, 2, number), positions, global_batch_size)
        for layer in self._norms:
            layer.weigh(weights)

    @property
    def positions(self) -> slice:
        """This rank's positions in a global batch."""
        return slice(self._micro_batches[0].start, self._micro_batches[-1].stop)

    @property
    def trained_model(self) -> nn.Module:
        """The weights to evaluate and to save: the average where there is one by now, or else the last."""
        if self._average is not None and int(self._average.n_averaged) > 0:
            return self._average.module
        return self._model

    def steps(self, batches: Iterable[TrainingBatch]) -> Iterator[StepReport]:
        """Train on this rank's `positions` of the global batches of `sampler.batches(self.step)`.

        Raises:
            FloatingPointError: a loss or a gradient is not finite, on any rank: it is raised on all. The weights are
                those before that step.
            LostProcessError: another rank is gone or does not answer. All is as it was before that step.
        """
        if self._device.type == "cuda":
            self.warm_up()
        for batch in batches:
            report = self._training_step(batch.within(self.positions.start, self._config.batch_size))
            self.settle()
            self._unsettled = report if self._settles_late else None
            yield report
        self.settle()

    def settle(self) -> None:
        """Check what a GPU has made of the last step, which nobody waited for when the next one was begun.

        Raises:
            FloatingPointError: its loss or its gradient is not finite, and since then no weight has changed.
        """
        report, self._unsettled = self._unsettled, None
        if report is not None and not all(map(math.isfinite, report.numbers.read())):
            self.step = report.step - 1
            raise _not_finite(*report.numbers.read())

    def _training_step(self, batch: TrainingBatch) -> StepReport:
        epoch = self._sampler.epoch_of(self.step)
        self._begin_epoch(epoch)
        learning_rate = self._peak * self._schedule(epoch)
        (clips,) = self._ranks.all_reduce([int(batch.valid.sum())])
        with self._ranks.step(), self._statistics_kept():
            numbers = self._optimizer_step(batch, clips, learning_rate) if clips else LateNumbers(torch.zeros(2))
        self.step += 1
        ends_epoch = self.step % self._sampler.steps_per_epoch == 0
        if self._average is not None and self._config.average.counts_step(epoch, ends_epoch):
            self._average.update_parameters(self._model)
        return StepReport(
            step=self.step,
            epoch=epoch,
            clips=clips,
            learning_rate=learning_rate,
            ends_epoch=ends_epoch,
            numbers=numbers,
        )

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Give batch norms back what they had, should a step with several ranks fail half-way: it is done again."""
        before = [buffer.clone() for buffer in self._model.buffers()] if self._ranks.world_size > 1 else []
        try:
            yield
        except BaseException:
            for buffer, value in zip(self._model.buffers(), before, strict=False):
                buffer.copy_(value)
            raise

    def _optimizer_step(self, batch: TrainingBatch, clips: int, learning_rate: float) -> LateNumbers:
        """Make one optimizer step with the mean over all ranks' `clips`; returns the loss and the gradient's norm."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._ranks.all_reduce_tensor(self._backward(batch.to(self._copies), clips))
        self._scaler.unscale_(self._optimizer)
        norm = get_total_norm(weight.grad for weight in self._model.parameters() if weight.grad is not None)
        values = torch.stack([loss, norm.float()])
        numbers = LateNumbers(values)
        # Never a step with what is not finite: from then on every weight would be lost, and so would the checkpoints.
        if self._settles_late:
            self._keep_weights_from(values)
        elif not self._allows_step(*numbers.read()):
            self._scaler.update()
            self.skipped_steps += 1
            return numbers
        if self._config.optimizer.max_gradient_norm is not None:
            clip_grads_with_norm_(self._model.parameters(), self._config.optimizer.max_gradient_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._optimizer.step()
        self._scaler.update()
        return numbers

    def _allows_step(self, loss: float, norm: float) -> bool:
        """Whether to change the weights; not where a gradient overflows only because float16 had it scaled up."""
        self._ranks.check()
        overflowed = self._scaler.is_enabled() and self._scaler.get_scale() >= 1  # then a smaller scale helps
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflowed):
            raise _not_finite(loss, norm)
        return math.isfinite(norm)

    def _keep_weights_from(self, values: Tensor) -> None:
        """Let the device itself leave out the step, and all that follow, where a value is not finite."""
        lost = (~values.isfinite()).any().float()
        self._lost = lost if self._lost is None else torch.maximum(self._lost, lost)
        self._optimizer.found_inf = self._lost  # pyright: ignore[reportAttributeAccessIssue]

    def _backward(self, batch: TrainingBatch, clips: int) -> Tensor:
        """Accumulate the gradient of the mean loss of all ranks' `clips`; returns this rank's part of that loss.

        Args:
            batch: this rank's part of the global batch.
            clips: how many clips of the global batch could be decoded.
        """
        loss, ranks, offset = torch.zeros((), device=self._device), self._ranks.world_size, self.positions.start
        for micro_batch in self._micro_batches:
            part = batch.only(slice(micro_batch.start - offset, micro_batch.stop - offset))
            learned = int(part.valid.sum())
            if not learned and ranks == 1:
                continue
            if not self._keeps_shape:
                # All ranks have to take part in every micro-batch: where no clip is left, silence is, and counts
                # nothing.
                part = part.only_valid() if learned else part.only(slice(0, 1))
            is_last = micro_batch is self._micro_batches[-1]
            # Gradients go over the network once a step; with the last micro-batch.
            with nullcontext() if is_last or ranks == 1 else self._network.no_sync():  # pyright: ignore[reportCallIssue]
                part_loss = self._loss(part)
                # The ranks' gradients are averaged, but what is wanted is their sum.
                self._scaler.scale(part_loss * (ranks * learned / clips)).backward()
            loss += part_loss.detach().float() * (learned / clips)
        return loss

    def _loss(self, part: TrainingBatch) -> Tensor:
        seed = self._config.seed
        # What draws from the global generator, as torch's own layers do, at least repeats when the run does.
        torch.manual_seed(seed_for(seed, self.step, 0))
        if self._keeps_shape:
            part = replace(part, clip_weights=student.send(part.valid.float(), self._device))
        if self._dropouts or self._norms:
            self._set_clips(student.send(part.positions, self._device), part.clip_weights, part.global_batch_size)
        generator = torch.Generator().manual_seed(seed_for(seed, self.step, 1))
        with autocast(self._device.type, self._precision):
            return self._learner.loss(self._network, part, generator)

    def _begin_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch: a function of its number alone, so that there is nothing to restore."""
        for network in (self._model, None if self._average is None else self._average.module):
            if network is not None:
                self._learner.begin_epoch(network, epoch)

    def broadcast_buffers(self) -> None:
        """Broadcast the first rank's batch statistics, before an evaluation or a checkpoint."""
        if self._ranks.world_size > 1 and not self._config.sync_batch_norm:
            with self._ranks.collectives():
                for buffer in self._model.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a later process needs to go on: tensors and plain values.

        Raises:
            FloatingPointError: see `settle`.
        """
        self.settle()
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            RuntimeError: it belongs to another model.
        """
        self.step = state["step"]
        # As earlier versions called it.
        self.skipped_steps = state["skipped_steps"] if "skipped_steps" in state else state["left_out"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        # An evaluation that was cut short belongs to the epoch of the last step.
        self._begin_epoch(self._sampler.epoch_of(max(self.step - 1, 0)))


def _not_finite(loss: float, norm: float) -> FloatingPointError:
    return FloatingPointError(f"the loss is {loss} and the norm of its gradient {norm}")
