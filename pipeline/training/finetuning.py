"""What every `pipeline finetune` command does: a student, pretrained on AudioSet, learns the classes of another set."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import student
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import Sampling
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.models.loading import build_for_training, check_registered
from pipeline.models.weights import Task
from pipeline.runtime.recipes import read_options
from pipeline.scoring.tagging_metrics import ranking_scores, tagging_metrics
from pipeline.training.loop import Learner, TrainingConfig
from pipeline.training.optimizing import OptimizerConfig
from pipeline.training.prior_bias import label_shares, set_prior_bias
from pipeline.training.run import RunResult, open_clips, run_training

_log = logging.getLogger(__name__)


# Classes of their own, not other arguments for the shared ones: a command line that sets one field of a table takes the
# others from the table's class.
@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """How gradients become steps."""

    reference_batch: int = 64
    """Batch size, in clips, that the learning rate is meant for; other batch sizes scale it in proportion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WavmixConfig(student.MixupConfig):
    """A first mixing, of sounds."""

    alpha: float = 2.0
    """Both parameters of the Beta distribution that lambda is drawn from; 0 switches it off."""
    rate: float = 0.5
    """Share of the clips that are mixed, 0 to 1."""
    of: student.MixedThing = "waveform"
    """What is mixed: the log-mel images, or the sounds before them, each without its mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneAugmentConfig(student.AugmentConfig):
    """What else is done to the sounds."""

    roll_samples: int = 4000
    """Waveforms are rolled in a circle by at most this much either way, in samples; 0 is off."""
    gain_db: float = 12.0
    """Waveforms get louder or softer by at most this much, in decibels; 0 is off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneScheduleConfig(student.ScheduleConfig):
    """The curve of the learning rate, made for 80 epochs."""

    warmup_epochs: float = 10.0
    """Length of the soft start, in epochs; 0 is none."""
    ramp_down_start_epoch: float = 10.0
    """Where the way down begins, in epochs."""
    ramp_down_epochs: float = 65.0
    """Length of the way down, in epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TrainingConfig):
    """How a student is fine-tuned; the defaults are what EfficientAT's recipes for other sets share."""

    model: str = "mn10_as"
    """Student to train: a released name such as mn10_as or dymn10_as, or mn01 to mn40."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the network, such as head_type or strides."""
    checkpoint: str | None = None
    """Weights to start from: a file, a URL, or a released name such as mn10_as, which is fetched once; without it the
    weights are drawn from the seed, which is seldom what fine-tuning means."""
    epochs: int = 80
    """Length of a run, in epochs."""
    sampling: Sampling = "uniform"
    """balanced: clips of rare classes are drawn more often, clips without labels never. uniform: all alike. stream:
    whole shards are read from start to end."""
    batch_size: int = 64
    """Clips a step."""
    channels_last: bool = True
    """Lay images out with the channels innermost, which convolutions on most machines prefer."""
    clip_seconds: float | None = None
    """Length of the sounds that the network takes, in seconds, above 0; longer ones are cut, shorter ones padded with
    silence. The model's own, 10 s, unless given."""
    label_smoothing: float = 0.0
    """Single-label sets: share of the target that all classes get alike, 0 to below 1."""
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    """The optimizer."""
    wavmix: WavmixConfig = field(default_factory=WavmixConfig)
    """Mixing of pairs of sounds."""
    mixup: student.MixupConfig = field(default_factory=student.MixupConfig)
    """Mixing of pairs of spectrograms, after that."""
    augment: FinetuneAugmentConfig = field(default_factory=FinetuneAugmentConfig)
    """What else is done to the sounds."""
    schedule: FinetuneScheduleConfig = field(default_factory=FinetuneScheduleConfig)
    """Learning rate over the epochs."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        check_registered(student, self.model)  # before a set is packed for it
        if self.ranks > 1:
            raise UsageError(f"--ranks {self.ranks}: a set for fine-tuning is small; train on one device")
        if self.clip_seconds is not None and not self.clip_seconds > 0:
            raise UsageError(f"clip_seconds is {self.clip_seconds}; choose a length above 0 s")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; choose a share from 0 to below 1")


class FinetuneLearner(Learner):
    """A student, and how it learns the labels of a set.

    Args:
        model: the student.
        task: whether a clip has one class or any number of them.
        config: how clips are mixed and changed.
        options: the keywords that the model was built with.
    """

    model: student.Tagger

    def __init__(
        self, model: student.Tagger, task: Task, config: FinetuneConfig, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(model)
        self.best_metric = "accuracy" if task == "single-label" else "mAP"
        self._task: Task = task
        self._config = config
        self._options = dict(options or {})

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Mix the clips, tag them, and compare with the equally mixed labels: a scalar, in nats."""
        config, randomness = self._config, student.Randomness(generator, batch.positions, batch.global_batch_size)
        with torch.no_grad():
            waveforms = student.augment_waveforms(batch.waveforms, config.augment, randomness)  # (batch, samples)
            # Twice the same partner would be one mix: the second time, pairs mix that are no neighbours.
            device = waveforms.device
            mixes = [
                (student.draw_mix(randomness, config.wavmix, distance=2).on(device), config.wavmix.of),
                (student.draw_mix(randomness, config.mixup).on(device), config.mixup.of),
            ]
            for mix in (mix for mix, of in mixes if of == "waveform"):
                waveforms = mix.of_waveforms(waveforms)
            features = self.model.front_end(waveforms, generator, batch.edge_shifts_hz)  # (batch, 1, mels, frames)
            features = student.augment_features(features, config.augment, randomness)
            for mix in (mix for mix, of in mixes if of == "spectrogram"):
                features = mix.of(features)
            positives, label_mask = student.known_labels(batch.labels, batch.label_mask)  # (batch, classes) each
            for mix, _ in sorted(mixes, key=lambda one: one[1] == "spectrogram"):
                positives, label_mask = mix.of(positives), mix.of(label_mask)
        logits = network(features).float()  # (batch, classes)
        if self._task == "single-label":
            return F.cross_entropy(logits, positives, label_smoothing=config.label_smoothing)
        return student.masked_bce(logits, positives, label_mask).mean()

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        """Returns mAP, mean ROC AUC and d′; accuracies where a clip has one class, or else the micro-averaged mAP."""
        if self._task == "single-label":
            logits = ranking_scores(logits, self._task)
            own = {
                "accuracy": student.accuracy(logits, labels),
                "class_accuracy": student.class_accuracy(logits, labels),
            }
            return {**own, **tagging_metrics(logits, labels)}
        known = np.ones(labels.shape, bool) if label_mask is None else label_mask
        micro = student.average_precision(logits[known], labels[known].astype(bool))
        return {**tagging_metrics(logits, labels, label_mask), "mAP_micro": micro}

    def model_metadata(self) -> dict[str, Any]:
        """Returns how to build the student, what its logits are for, and how long its inputs are."""
        kwargs = dict(self._options)
        if isinstance(self.model, student.DyMN):
            kwargs["T_max"] = self.model.temperature
        own = {"task": self._task, "input_seconds": self.model.input_seconds}
        return {"stage": "student", "model": self.model.model_name, "kwargs": kwargs, **own}


def train_on(config: FinetuneConfig, manifest: Manifest, eval_manifest: Manifest | None, task: Task) -> RunResult:
    """Fine-tune one student.

    Args:
        config: the settings; its `run` is the folder of this very run.
        manifest: the clips to learn from.
        eval_manifest: the clips to evaluate on, if any.
        task: whether a clip has one class or any number of them.

    Raises:
        PipelineError: the settings, the clips or the checkpoint don't fit, or the run can't go on.
    """
    for one in filter(None, (manifest, eval_manifest)):
        _check_task(one, task)
    options = read_options(config.model_options)
    if config.checkpoint is None:
        _log.warning("no --checkpoint: the student starts from random weights; --checkpoint mn10_as is pretrained")
    classes, start = len(manifest.vocabulary), config.checkpoint
    model = build_for_training(
        student, config.model, start, seed=config.seed, warm_start=True, num_classes=classes, **options
    )
    if config.clip_seconds is not None:
        model.input_seconds = config.clip_seconds
    if config.prior_bias:
        set_prior_bias(model, label_shares(manifest))
    return run_training(
        config,
        FinetuneLearner(model, task, config, options),
        dataset=open_clips(config, manifest, model),
        eval_dataset=None if eval_manifest is None else open_clips(config, eval_manifest, model),
        schedule=partial(student.learning_rate_multiplier, config=config.schedule),
    )


def labels_a_clip(manifest: Manifest) -> np.ndarray:
    """Count the labels of each clip: (clips,)."""
    return np.diff(manifest.labels_csr[0])


def _check_task(manifest: Manifest, task: Task) -> None:
    if task == "single-label" and len(wrong := np.flatnonzero(labels_a_clip(manifest) != 1)):
        raise UsageError(
            f"{manifest.location}: {len(wrong)} of {len(manifest)} clips have no class or several, the first is "
            f"{manifest.clip_ids[int(wrong[0])]}; a single-label set has one each. Choose --task multi-label"
        )
