"""`pipeline train-teacher`: fine-tunes a transformer on a dataset's own classes, and on other teachers' logits."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

import student
import teacher
from pipeline.dataset.manifest import Manifest
from pipeline.models.loading import build_for_training
from pipeline.training.distillation import DistillationConfig, distil
from pipeline.training.optimizing import AverageConfig
from pipeline.training.run import RunResult
from pipeline.training.teacher_learner import TeacherLearner, TeacherOptimizerConfig, check_patchout


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchoutConfig:
    """Patches of the spectrogram that a training step leaves out: faster, and harder to learn by heart."""

    time: int = 40
    """Columns of the patch grid (moments) to leave out; 0 or more."""
    frequency: int = 4
    """Rows of the patch grid (bands) to leave out; 0 or more."""
    single: int = 0
    """Patches to leave out of what then remains; 0 or more."""


# Classes of their own, not other arguments for the shared ones: a command line that sets one field of a table takes the
# others from the table's class.
@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherAverageConfig(AverageConfig):
    """Averages of the weights along the run, which are then evaluated and saved instead of the last weights."""

    kind: Literal["none", "ema", "swa"] = "swa"
    """ema: a running mean that forgets, updated every step. swa: the plain mean over some epochs' ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScheduleConfig(student.ScheduleConfig):
    """The learning rate's curve, made for 130 epochs."""

    warmup_epochs: float = 5.0
    """Length of the soft start, in epochs; 0 is none."""
    ramp_down_start_epoch: float = 50.0
    """Where the way down begins, in epochs."""
    ramp_down_epochs: float = 50.0
    """Length of the way down, in epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTeacherConfig(DistillationConfig):
    """How a transformer is trained; the defaults are the recipe of PaSST (arXiv:2110.05069)."""

    model: str = "passt_s"
    """Teacher to train: a registered name, such as passt_s, ast_base, passt_tiny."""
    epochs: int = 130
    """Length of the run, in epochs."""
    batch_size: int = 12
    """Clips a step."""
    learning_rate: float = 2e-5
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""
    optimizer: TeacherOptimizerConfig = field(default_factory=TeacherOptimizerConfig)
    """The optimizer."""
    average: TeacherAverageConfig = field(default_factory=TeacherAverageConfig)
    """Weight averaging."""
    patchout: PatchoutConfig = field(default_factory=PatchoutConfig)
    """Patches left out in training."""
    schedule: TeacherScheduleConfig = field(default_factory=TeacherScheduleConfig)
    """Learning rate over the epochs."""
    export_dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in last.safetensors and best.safetensors; float16 halves the files."""


def run(config: Annotated[TrainTeacherConfig, Parameter(name="*")]) -> RunResult:
    """Fine-tune a transformer on a dataset's own classes, with patchout and mixup as PaSST does.

    With --store it learns from other teachers' logits too, by the same loss as a student: so teachers are chained, and
    a small transformer is a student itself.

    Start from a released checkpoint with --checkpoint: its last layer starts afresh where the classes are others. The
    run's folder receives the same as a student's; best.safetensors or last.safetensors can then teach:
    `pipeline teacher-logits --teacher NAME=RUN/best.safetensors`.

    Raises:
        PipelineError: the settings, the dataset or the checkpoint don't fit, or the run can't go on.
    """
    if config.ranks > 1:
        from pipeline.training.ray_ranks import train_on_ray

        return train_on_ray(run, config)
    return distil(config, partial(_start, config), export_dtype=getattr(torch, config.export_dtype))


def _start(config: TrainTeacherConfig, manifest: Manifest) -> TeacherLearner:
    model = build_for_training(
        teacher,
        config.model,
        config.checkpoint,
        seed=config.seed,
        num_classes=len(manifest.vocabulary),
        s_patchout_t=config.patchout.time,
        s_patchout_f=config.patchout.frequency,
        u_patchout=config.patchout.single,
    )
    check_patchout(model)
    return TeacherLearner(model, config.mixup, config.augment, config.distill)
