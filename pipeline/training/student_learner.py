"""A student in training: a CNN, and what its epochs and its files of weights need."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import student
from pipeline.training.distillation import DistillationLearner, MixedFeatures


class StudentLearner(DistillationLearner):
    """A student, trained on its clips' labels and on the logits of the teachers.

    Args:
        model: the student.
        distill: how labels and teacher share the loss.
        mixup: how clips are mixed.
        augment: what else is done to their sounds.
        options: the keywords that the model was built with.
    """

    model: student.Tagger
    weighs_clips = True

    def __init__(
        self,
        model: student.Tagger,
        distill: student.DistillConfig,
        mixup: student.MixupConfig,
        augment: student.AugmentConfig,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, distill, mixup, augment)
        self._options = dict(options or {})

    def mask(self, features: Tensor, randomness: student.Randomness, frames: Tensor | None = None) -> Tensor:
        """Hide bands and frames of (batch, 1, mels, frames)."""
        return student.augment_features(features, self._augment, randomness, frames)

    def tag(self, network: nn.Module, shown: MixedFeatures, generator: torch.Generator) -> Tensor:
        """Returns the logits, (batch, classes)."""
        return network(shown.features)

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
