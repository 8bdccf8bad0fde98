"""`pipeline train-student`: stage 2. Shards joined with teacher logits → a small CNN."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor, nn

import student
from pipeline.batches.join import TrainingBatch
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.views import ViewsStamp
from pipeline.errors import UsageError
from pipeline.logits.alignment import AlignedLogits
from pipeline.logits.store import open_store
from pipeline.models.loading import build_for_training
from pipeline.runtime.recipes import read_options
from pipeline.scoring.tagging_metrics import tagging_metrics
from pipeline.training.loop import Learner, TrainingConfig, set_prior_bias
from pipeline.training.run import RunResult, open_clips, run_training

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStudentConfig(TrainingConfig):
    """How a student is trained; the defaults are the recipe of EfficientAT (arXiv:2211.04772)."""

    model: str = "mn10"
    """Student to train: mn01 to mn40, dymn04, dymn10, dymn20, or a released name such as mn10_as."""
    channels_last: bool = True
    """Lay images out with the channels innermost, which convolutions on most machines prefer."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the network, such as head_type or strides."""
    store: str | None = None
    """Logit store of the teachers, a folder or URL; without it the student learns from the labels alone."""
    consistent_views: bool = True
    """Where the store has several views of a clip, show the student one of them at a time, with what the teachers said
    of that one; off: the clip as it is, with the jitter of the recipe."""
    distill: student.DistillConfig = field(default_factory=student.DistillConfig)
    """How labels and teacher share the loss."""
    mixup: student.MixupConfig = field(default_factory=student.MixupConfig)
    """Mixing of pairs of clips."""
    augment: student.AugmentConfig = field(default_factory=student.AugmentConfig)
    """What else is done to the sounds; the recipe does nothing."""
    schedule: student.ScheduleConfig = field(default_factory=student.ScheduleConfig)
    """Learning rate over the epochs."""
    batch_norm_momentum: float | None = None
    """Share of each batch in the statistics that batch norms gather for evaluation, above 0, up to 1; without it the
    network's own 0.01, which takes hundreds of steps to settle. A run of a few hundred steps needs 0.1."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if self.batch_norm_momentum is not None and not 0 < self.batch_norm_momentum <= 1:
            raise UsageError(f"batch_norm_momentum is {self.batch_norm_momentum}; choose a value above 0, up to 1")


class StudentLearner(Learner):
    """A student, and what it is to learn from a batch: its labels, and what the teachers said.

    Args:
        model: the student.
        distill: how labels and teacher share the loss.
        mixup: how clips are mixed.
        augment: what else is done to their sounds.
        options: the keywords that the model was built with.
    """

    model: student.Tagger

    def __init__(
        self,
        model: student.Tagger,
        distill: student.DistillConfig,
        mixup: student.MixupConfig,
        augment: student.AugmentConfig,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model)
        self._distill = distill
        self._mixup = mixup
        self._augment = augment
        self._options = dict(options or {})

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Mix the clips, tag them, and compare with the equally mixed targets: a scalar, in nats."""
        randomness = student.Randomness(generator, batch.positions, batch.global_batch_size)
        with torch.no_grad():
            waveforms = student.augment_waveforms(batch.waveforms, self._augment, randomness)  # (batch, samples)
            mix = student.draw_mix(randomness, self._mixup)
            if self._mixup.of == "waveform":
                waveforms = mix.of_waveforms(waveforms)  # heard through the bands of the clip with the larger share
            features = self.model.front_end(waveforms, generator, batch.edge_shifts_hz)  # (batch, 1, mels, frames)
            features = student.augment_features(features, self._augment, randomness)
            if self._mixup.of == "spectrogram":
                features = mix.of(features)
            teacher_probs = student.teacher_probabilities(batch.teacher_logits, self._distill)  # (batch, classes)
        logits = network(features)  # (batch, classes)
        return student.distillation_loss(logits, batch.labels, teacher_probs, batch.has_teacher, self._distill, mix=mix)

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        """Returns mAP, mean ROC AUC and d′."""
        return tagging_metrics(logits, labels, label_mask)

    def begin_epoch(self, network: nn.Module, epoch: int) -> None:
        """Lower the temperature of a DyMN's kernels."""
        if isinstance(network, student.DyMN):
            network.update_params(epoch)

    def model_metadata(self) -> dict[str, Any]:
        """Returns how to build the student; a DyMN at the temperature that it has now."""
        kwargs = dict(self._options)
        if isinstance(self.model, student.DyMN):
            kwargs["T_max"] = self.model.temperature
        return {"stage": "student", "model": self.model.model_name, "kwargs": kwargs}


def run(config: Annotated[TrainStudentConfig, Parameter(name="*")]) -> RunResult:
    """Train a small CNN on a dataset, to give its clips' labels and the logits that the teachers gave them.

    A clip without logits learns from its labels alone. The run's folder receives the settings (config.toml, which can
    be given as --config), metrics.jsonl and TensorBoard events, checkpoints, and the weights: last.safetensors and,
    with --eval-data, best.safetensors. Ctrl-C and SIGTERM save before they stop; --resume goes on exactly there.

    Raises:
        PipelineError: the settings, the dataset, the store or the checkpoint don't fit, or the run can't go on.
    """
    if config.ranks > 1:
        from pipeline.training.ray_ranks import train_on_ray

        return train_on_ray(run, config)
    manifest = read_manifest(config.data)
    eval_manifest = None if config.eval_data is None else read_manifest(config.eval_data)
    options = read_options(config.model_options)
    classes, start = len(manifest.vocabulary), config.checkpoint
    model = build_for_training(
        student, config.model, start, seed=config.seed, warm_start=True, num_classes=classes, **options
    )
    if config.prior_bias:
        set_prior_bias(model, manifest)
    if config.batch_norm_momentum is not None:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = config.batch_norm_momentum
    logits, views = _open_logits(config, manifest)
    return run_training(
        config,
        StudentLearner(model, config.distill, config.mixup, config.augment, options),
        dataset=open_clips(config, manifest, model, logits, views),
        eval_dataset=None if eval_manifest is None else open_clips(config, eval_manifest, model),
        schedule=partial(student.learning_rate_multiplier, config=config.schedule),
    )


def _open_logits(config: TrainStudentConfig, manifest: Manifest) -> tuple[AlignedLogits | None, ViewsStamp | None]:
    """Returns the teachers' logits, if there are any, and which views of the clips they are of."""
    if config.store is None:
        _log.info("no --store: the student learns from the labels alone")
        return None, None
    cache, store = config.cache_folder(), open_store(config.store)
    views = store.stamp.views if config.consistent_views else None
    all_views = views is not None
    cache.make_room(2 * len(manifest) * len(manifest.vocabulary) * (store.stamp.view_count if all_views else 1))
    logits = store.align(manifest, cache.folder, all_views=all_views)
    while not cache.hold(logits.path):  # another run made room just now
        logits = store.align(manifest, cache.folder, all_views=all_views)
    if views is not None:
        _log.info("%s: the student is shown one of %d views of a clip at a time", config.store, views.count)
    missing = int(np.count_nonzero(~logits.has_logits))
    if missing:
        _log.warning(
            "%d of %d clips have no logits in %s: they learn from labels alone", missing, len(manifest), config.store
        )
    return logits, views
