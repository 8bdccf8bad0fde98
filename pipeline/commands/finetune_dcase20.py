"""`pipeline finetune dcase20`: acoustic scenes, recorded by several devices."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.tau_urban import TauUrban
from pipeline.training.finetuning_rounds import FinetuneResult, PublishedSetConfig, finetune


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDcase20Config(PublishedSetConfig):
    """How a student is fine-tuned on TAU Urban Acoustic Scenes 2020 Mobile; the defaults are EfficientAT's recipe."""

    learning_rate: float = 8e-4
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""


def run(config: Annotated[FinetuneDcase20Config, Parameter(name="*")]) -> FinetuneResult:
    """Fine-tune on the development set of DCASE 2020's task 1A, TAU Urban Acoustic Scenes 2020 Mobile.

    --source is the folder with meta.csv, evaluation_setup/ and audio/. RUN/fold1 is a training run as
    `pipeline train-student` makes them; RUN/summary.json has the accuracy after the last epoch.

    Raises:
        PipelineError: the source, the settings or the checkpoint don't fit, or a run can't go on.
    """
    return finetune(config, TauUrban())
