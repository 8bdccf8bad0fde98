"""What `train-student` and `train-teacher` share: a model of any kind learns from labels and from stored logits."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import student
import teacher
from pipeline.batches.join import TrainingBatch
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import UsageError
from pipeline.scoring.tagging_metrics import tagging_metrics
from pipeline.training.loop import Learner, TrainingConfig
from pipeline.training.prior_bias import label_shares, set_prior_bias, target_shares
from pipeline.training.run import RunResult, open_clips, run_training
from pipeline.training.stored_logits import open_logits

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig(TrainingConfig):
    """What both training commands share: where the logits are, and how clips are learned from."""

    store: str | None = None
    """Logit store of the teachers, a folder or URL; without it the model learns from the labels alone."""
    consistent_views: bool = True
    """Where the store has several views of a clip, show the model one of them at a time, with the teachers'
    logits of that one; off: the clip as it is, with the jitter of the recipe."""
    label_share: float = 1.0
    """Share of the clips, 0 to 1, that keep their labels; those of the others count as unknown, and they learn from the
    logits alone. A hash of its id decides for each clip, so that a smaller share is a part of a larger one."""
    distill: student.DistillConfig = field(default_factory=student.DistillConfig)
    """How labels and teacher share the loss."""
    mixup: student.MixupConfig = field(default_factory=student.MixupConfig)
    """Mixing of pairs of clips."""
    augment: student.AugmentConfig = field(default_factory=student.AugmentConfig)
    """What else is done to the sounds; the recipe does nothing."""
    schedule: student.ScheduleConfig = field(default_factory=student.ScheduleConfig)
    """Learning rate over the epochs."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if not 0 <= self.label_share <= 1:
            raise UsageError(f"label_share is {self.label_share}; choose a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class MixedFeatures:
    """What a network is shown of a batch."""

    features: Tensor
    """(batch, …), as its front end gives them."""
    frames: Tensor | None
    """(batch,): how many frames are each clip's own, for clips of unlike lengths; None where that is all of them."""
    mix: student.Mix


class DistillationLearner(Learner):
    """A model, and how it learns from its clips' labels and from the logits of the teachers.

    Args:
        model: the network, with its `front_end`.
        distill: how labels and teacher share the loss.
        mixup: how clips are mixed.
        augment: what else is done to their sounds.
    """

    model: student.Tagger | teacher.AudioTransformer

    def __init__(
        self,
        model: student.Tagger | teacher.AudioTransformer,
        distill: student.DistillConfig,
        mixup: student.MixupConfig,
        augment: student.AugmentConfig,
    ) -> None:
        super().__init__(model)
        self._distill = distill
        self._mixup = mixup
        self._augment = augment

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Mix the clips, tag them, and compare with the equally mixed targets: a scalar, in nats."""
        with torch.no_grad():
            shown = self.show(batch, generator)
            teacher_probs = student.teacher_probabilities(batch.teacher_logits, self._distill)  # (batch, classes)
        logits = self.tag(network, shown, generator)  # (batch, classes)
        return student.distillation_loss(
            logits,
            batch.labels,
            teacher_probs,
            batch.has_teacher,
            self._distill,
            label_mask=batch.label_mask,
            mix=shown.mix,
            clip_weights=batch.clip_weights,
        )

    def show(self, batch: TrainingBatch, generator: torch.Generator) -> MixedFeatures:
        """Returns the features of a batch's clips, augmented and mixed."""
        valid = None if batch.clip_weights is None else batch.valid
        randomness = student.Randomness(generator, batch.positions, batch.global_batch_size, valid)
        lengths, front_end, own, frames = batch.lengths, self.model.front_end, {}, None
        waveforms = student.augment_waveforms(batch.padded(), self._augment, randomness, lengths)  # (batch, samples)
        drawn = student.draw_mix(randomness, self._mixup)
        mix = drawn.on(waveforms.device)
        if self._mixup.of == "waveform":
            # Heard through the bands of the clip with the larger share.
            waveforms = mix.of_waveforms(waveforms, lengths)
            lengths = None if lengths is None else drawn.of_lengths(lengths)
        if lengths is not None and isinstance(front_end, teacher.FrontEnd):
            own, frames = {"lengths": lengths}, front_end.frames(lengths)  # (batch,)
        features = self.mask(front_end(waveforms, generator, batch.edge_shifts_hz, **own), randomness, frames)
        if self._mixup.of == "spectrogram":
            features, frames = mix.of(features), None if frames is None else drawn.of_lengths(frames)
        return MixedFeatures(features, frames, mix)

    @abstractmethod
    def mask(self, features: Tensor, randomness: student.Randomness, frames: Tensor | None = None) -> Tensor:
        """Hide bands and frames of a front end's features; `frames`, (batch,), are each clip's own."""

    @abstractmethod
    def tag(self, network: nn.Module, shown: MixedFeatures, generator: torch.Generator) -> Tensor:
        """Returns the logits, (batch, classes)."""

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        """Returns mAP, mean ROC AUC and d′."""
        return tagging_metrics(logits, labels, label_mask)


def distil(
    config: DistillationConfig,
    start: Callable[[Manifest], DistillationLearner],
    *,
    export_dtype: torch.dtype = torch.float32,
) -> RunResult:
    """Train one model on the labels of a dataset and, where there is a store, on the logits in it.

    Args:
        config: the settings.
        start: the dataset to learn from → the model before its first step, and how it learns.
        export_dtype: of the numbers in the files of weights.

    Raises:
        PipelineError: the settings, the dataset, the store or the checkpoint don't fit, or the run can't go on.
    """
    manifest = read_manifest(config.data).with_label_share(config.label_share)
    eval_manifest = None if config.eval_data is None else read_manifest(config.eval_data)
    learner = start(manifest)
    model: Any = learner.model
    logits, views = None, None
    if config.store is None:
        _log.info("no --store: the model learns from the labels alone")
    else:
        cache = config.cache_folder()
        logits, views = open_logits(config.store, manifest, cache, consistent_views=config.consistent_views)
    if config.prior_bias:
        known = label_shares(manifest) if logits is None else target_shares(manifest, logits, config.distill)
        set_prior_bias(model, known)
    return run_training(
        config,
        learner,
        dataset=open_clips(config, manifest, model, logits, views),
        eval_dataset=None if eval_manifest is None else open_clips(config, eval_manifest, model),
        schedule=partial(student.learning_rate_multiplier, config=config.schedule),
        export_dtype=export_dtype,
    )
