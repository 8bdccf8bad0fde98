"""A student in training: its loss against labels and teacher logits, and its metrics."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import student
from pipeline.batches.join import TrainingBatch
from pipeline.scoring.tagging_metrics import tagging_metrics
from pipeline.training.loop import Learner


class StudentLearner(Learner):
    """A student, trained on its clips' labels and on the logits of the teachers.

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
        return student.distillation_loss(
            logits,
            batch.labels,
            teacher_probs,
            batch.has_teacher,
            self._distill,
            label_mask=batch.label_mask,
            mix=mix,
        )

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
