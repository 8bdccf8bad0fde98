"""A transformer in training: its layers' learning rates, its patchout, its files of weights."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import student
import teacher
from pipeline.errors import UsageError
from pipeline.training.distillation import DistillationLearner, MixedFeatures
from pipeline.training.optimizing import OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOptimizerConfig(OptimizerConfig):
    """How gradients become steps."""

    kind: Literal["adam", "adamw"] = "adamw"
    """adamw takes the weight decay out of the gradient's scaling."""
    weight_decay: float = 1e-4
    """Share of a weight that decays each step, times the learning rate; 0 or more."""
    reference_batch: int = 12
    """Batch size, in clips, that the learning rate is meant for; other batch sizes scale it in proportion."""
    layer_decay: float = 1.0
    """What the learning rate of each block is multiplied by on the way from the head down to the patches, above 0, up
    to 1. 1, PaSST's recipe, is the same rate everywhere; 0.75 keeps more of a pretrained model when clips are few."""
    decay_all: bool = True
    """Weight decay reaches biases, norms, tokens and position encodings too, as in PaSST's recipe. Off leaves those
    alone, as the recipes of most other transformers do."""

    def __post_init__(self) -> None:
        OptimizerConfig.__post_init__(self)
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"optimizer.layer_decay is {self.layer_decay}; choose a value above 0, up to 1")


class TeacherLearner(DistillationLearner):
    """A transformer, trained on its clips' labels and on the logits of other teachers.

    Args:
        model: the transformer, built with its patchout.
        mixup: how clips are mixed.
        augment: what else is done to their sounds.
        distill: how labels and teachers share the loss.
    """

    model: teacher.AudioTransformer

    def __init__(
        self,
        model: teacher.AudioTransformer,
        mixup: student.MixupConfig,
        augment: student.AugmentConfig,
        distill: student.DistillConfig | None = None,
    ) -> None:
        super().__init__(model, distill or student.DistillConfig(), mixup, augment)

    def mask(self, features: Tensor, randomness: student.Randomness, frames: Tensor | None = None) -> Tensor:
        """Hide bands and frames of (batch, mels, frames), or of AST's (batch, frames, mels)."""
        time_first = self.model.front_end.time_first
        images = (features.mT if time_first else features)[:, None]  # (batch, 1, mels, frames)
        masked = student.augment_features(images, self._augment, randomness, frames)[:, 0]  # (batch, mels, frames)
        return masked.mT if time_first else masked

    def tag(self, network: nn.Module, shown: MixedFeatures, generator: torch.Generator) -> Tensor:
        """Returns the logits, (batch, classes)."""
        return network(shown.features, generator, shown.frames)

    def model_metadata(self) -> dict[str, Any]:
        """Returns how to build the teacher. Patchout is no part of what was learned, so the files don't hand it on."""
        return {"stage": "teacher", "model": self.model.model_name, "kwargs": {}}

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Divide the weights by their depth, for layer-wise rates, and by whether weight decay reaches them."""
        assert isinstance(config, TeacherOptimizerConfig)
        return param_groups_layer_decay(
            self.model,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            no_weight_decay_list=[] if config.decay_all else sorted(self.model.no_weight_decay()),
            weight_decay_exclude_1d=not config.decay_all,
        )


def check_patchout(model: teacher.AudioTransformer) -> None:
    """Refuse a patchout that leaves no patches, before the run begins rather than in its first step."""
    # Two clips, since M2D and ATST normalise by the batch.
    silence = torch.zeros(2, round(model.sample_rate_hz * model.input_seconds))  # (batch, samples)
    try:
        with torch.no_grad():
            deepcopy(model).train()(model.front_end(silence))  # a copy: silence is nothing to take statistics of
    except ValueError as error:
        raise UsageError(f"--patchout: too much for {model.model_name}: {error}") from error
