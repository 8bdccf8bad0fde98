"""`pipeline train-teacher`: fine-tunes a transformer on a dataset's own classes."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import student
import teacher
from pipeline.batches.join import TrainingBatch
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.models.loading import build_for_training
from pipeline.scoring.tagging_metrics import tagging_metrics
from pipeline.training.loop import AverageConfig, Learner, OptimizerConfig, TrainingConfig, set_prior_bias
from pipeline.training.run import RunResult, open_clips, run_training


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
class TrainTeacherConfig(TrainingConfig):
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
    mixup: student.MixupConfig = field(default_factory=student.MixupConfig)
    """Mixing of pairs of clips."""
    augment: student.AugmentConfig = field(default_factory=student.AugmentConfig)
    """What else is done to the sounds."""
    schedule: TeacherScheduleConfig = field(default_factory=TeacherScheduleConfig)
    """Learning rate over the epochs."""
    export_dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in last.safetensors and best.safetensors; float16 halves the files."""


class TeacherLearner(Learner):
    """A transformer, and how it learns from labels.

    Args:
        model: the transformer, built with its patchout.
        mixup: how clips are mixed.
        augment: what else is done to their sounds.
    """

    model: teacher.AudioTransformer

    def __init__(
        self, model: teacher.AudioTransformer, mixup: student.MixupConfig, augment: student.AugmentConfig
    ) -> None:
        super().__init__(model)
        self._mixup = mixup
        self._augment = augment

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """Mix the clips, tag them, and compare with the equally mixed labels: a scalar, in nats."""
        randomness = student.Randomness(generator, batch.positions, batch.global_batch_size)
        with torch.no_grad():
            waveforms = student.augment_waveforms(batch.waveforms, self._augment, randomness)  # (batch, samples)
            mix = student.draw_mix(randomness, self._mixup)
            if self._mixup.of == "waveform":
                waveforms = mix.of_waveforms(waveforms)
            features = self.mask(self.model.front_end(waveforms, generator), randomness)
            if self._mixup.of == "spectrogram":
                features = mix.of(features)
        logits = network(features, generator)  # (batch, classes)
        return student.clip_bce(logits, mix.of(batch.labels)).mean()

    def mask(self, features: Tensor, randomness: student.Randomness) -> Tensor:
        """Hide bands and frames of (batch, mels, frames), or of AST's (batch, frames, mels)."""
        time_first = self.model.front_end.time_first
        images = (features.mT if time_first else features)[:, None]  # (batch, 1, mels, frames)
        masked = student.augment_features(images, self._augment, randomness)[:, 0]  # (batch, mels, frames)
        return masked.mT if time_first else masked

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        """Returns mAP, mean ROC AUC and d′."""
        return tagging_metrics(logits, labels, label_mask)

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


def run(config: Annotated[TrainTeacherConfig, Parameter(name="*")]) -> RunResult:
    """Fine-tune a transformer on a dataset's own classes, with patchout and mixup as PaSST does.

    Start from a released checkpoint with --checkpoint: its last layer starts afresh where the classes are others. The
    run's folder receives the same as a student's; best.safetensors or last.safetensors can then teach:
    `pipeline teacher-logits --teacher NAME=RUN/best.safetensors`.

    Raises:
        PipelineError: the settings, the dataset or the checkpoint don't fit, or the run can't go on.
    """
    if config.ranks > 1:
        from pipeline.training.ray_ranks import train_on_ray

        return train_on_ray(run, config)
    manifest = read_manifest(config.data)
    eval_manifest = None if config.eval_data is None else read_manifest(config.eval_data)
    model = _build_model(config, classes=len(manifest.vocabulary))
    if config.prior_bias:
        set_prior_bias(model, manifest)
    return run_training(
        config,
        TeacherLearner(model, config.mixup, config.augment),
        dataset=open_clips(config, manifest, model),
        eval_dataset=None if eval_manifest is None else open_clips(config, eval_manifest, model),
        schedule=partial(student.learning_rate_multiplier, config=config.schedule),
        export_dtype=getattr(torch, config.export_dtype),
    )


def _build_model(config: TrainTeacherConfig, *, classes: int) -> teacher.AudioTransformer:
    patchout = config.patchout
    model = build_for_training(
        teacher,
        config.model,
        config.checkpoint,
        seed=config.seed,
        num_classes=classes,
        s_patchout_t=patchout.time,
        s_patchout_f=patchout.frequency,
        u_patchout=patchout.single,
    )
    _check_patchout(model)
    return model


def _check_patchout(model: teacher.AudioTransformer) -> None:
    """Refuse a patchout that leaves no patches, before the run begins rather than in its first step."""
    silence = torch.zeros(1, round(model.sample_rate_hz * model.input_seconds))  # (batch, samples)
    try:
        with torch.no_grad():
            model.train()(model.front_end(silence))
    except ValueError as error:
        raise UsageError(f"--patchout: too much for {model.model_name}: {error}") from error
