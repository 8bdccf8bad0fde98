"""`pipeline finetune openmic`: instruments, of which a few are known for each clip."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.openmic import OpenMic
from pipeline.training.finetuning_rounds import FinetuneResult, PublishedSetConfig, finetune


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOpenMicConfig(PublishedSetConfig):
    """How a student is fine-tuned on OpenMIC-2018; the defaults are EfficientAT's recipe."""

    learning_rate: float = 1e-5
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""


def run(config: Annotated[FinetuneOpenMicConfig, Parameter(name="*")]) -> FinetuneResult:
    """Fine-tune on OpenMIC-2018: instruments of which nothing is known in a clip are neither learned nor scored.

    --source is the folder openmic-2018. RUN/split01 is a training run as `pipeline train-student` makes them;
    RUN/summary.json has the mAP on the published test partition after the last epoch.

    Raises:
        PipelineError: the source, the settings or the checkpoint don't fit, or a run can't go on.
    """
    return finetune(config, OpenMic())
