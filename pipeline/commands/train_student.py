"""`pipeline train-student`: stage 2. Shards joined with teacher logits → a small CNN."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from torch import nn

import student
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.models.loading import build_for_training
from pipeline.runtime.recipes import read_options
from pipeline.training.distillation import DistillationConfig, distil
from pipeline.training.run import RunResult
from pipeline.training.student_learner import StudentLearner


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStudentConfig(DistillationConfig):
    """How a student is trained; the defaults are the recipe of EfficientAT (arXiv:2211.04772)."""

    model: str = "mn10"
    """Student to train: mn01 to mn40, dymn04, dymn10, dymn20, or a released name such as mn10_as."""
    channels_last: bool = True
    """Lay images out with the channels innermost, which convolutions on most machines prefer."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the network, such as head_type or strides."""
    batch_norm_momentum: float | None = None
    """Share of each batch in the statistics that batch norms gather for evaluation, above 0, up to 1; without it the
    network's own 0.01, which takes hundreds of steps to settle. A run of a few hundred steps needs 0.1."""

    def __post_init__(self) -> None:
        DistillationConfig.__post_init__(self)
        if self.batch_norm_momentum is not None and not 0 < self.batch_norm_momentum <= 1:
            raise UsageError(f"batch_norm_momentum is {self.batch_norm_momentum}; choose a value above 0, up to 1")


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
    return distil(config, partial(_start, config))


def _start(config: TrainStudentConfig, manifest: Manifest) -> StudentLearner:
    options = read_options(config.model_options)
    classes, checkpoint = len(manifest.vocabulary), config.checkpoint
    model = build_for_training(
        student, config.model, checkpoint, seed=config.seed, warm_start=True, num_classes=classes, **options
    )
    if config.batch_norm_momentum is not None:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = config.batch_norm_momentum
    return StudentLearner(model, config.distill, config.mixup, config.augment, options)
