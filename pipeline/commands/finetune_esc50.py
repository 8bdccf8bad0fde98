"""`pipeline finetune esc50`: five folds, one model each."""

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.esc50 import Esc50
from pipeline.training.finetuning import FinetuneOptimizerConfig
from pipeline.training.finetuning_rounds import FinetuneResult, PublishedSetConfig, finetune


@dataclass(frozen=True, kw_only=True, slots=True)
class Esc50OptimizerConfig(FinetuneOptimizerConfig):
    """How gradients become steps."""

    reference_batch: int = 128
    """Batch size, in clips, that the learning rate is meant for; other batch sizes scale it in proportion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneEsc50Config(PublishedSetConfig):
    """How a student is fine-tuned on ESC-50; the defaults are EfficientAT's recipe."""

    clip_seconds: float | None = 5.0
    """Length of the sounds that the network takes, in seconds, above 0."""
    batch_size: int = 128
    """Clips a step."""
    learning_rate: float = 6e-5
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""
    optimizer: Esc50OptimizerConfig = field(default_factory=Esc50OptimizerConfig)
    """The optimizer."""


def run(config: Annotated[FinetuneEsc50Config, Parameter(name="*")]) -> FinetuneResult:
    """Fine-tune on ESC-50: five models, each tested on the fold that it did not learn from.

    --source is the folder ESC-50-master, with meta/esc50.csv and audio/. RUN/fold1 to RUN/fold5 are training runs as
    `pipeline train-student` makes them; RUN/summary.json has each fold's accuracy after its last epoch and their mean.

    Raises:
        PipelineError: the source, the settings or the checkpoint don't fit, or a run can't go on.
    """
    return finetune(config, Esc50())
