"""`pipeline train-student`: stage 2. Shards joined with teacher logits → a small CNN."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from torch import nn

import student
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.models.loading import build_for_training
from pipeline.runtime.recipes import read_options
from pipeline.training.loop import TrainingConfig, set_prior_bias
from pipeline.training.run import RunResult, open_clips, run_training
from pipeline.training.stored_logits import open_logits
from pipeline.training.student_learner import StudentLearner

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
    """Where the store has several views of a clip, show the student one of them at a time, with the teachers'
    logits of that one; off: the clip as it is, with the jitter of the recipe."""
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
    logits, views = None, None
    if config.store is None:
        _log.info("no --store: the student learns from the labels alone")
    else:
        cache = config.cache_folder()
        logits, views = open_logits(config.store, manifest, cache, consistent_views=config.consistent_views)
    return run_training(
        config,
        StudentLearner(model, config.distill, config.mixup, config.augment, options),
        dataset=open_clips(config, manifest, model, logits, views),
        eval_dataset=None if eval_manifest is None else open_clips(config, eval_manifest, model),
        schedule=partial(student.learning_rate_multiplier, config=config.schedule),
    )
