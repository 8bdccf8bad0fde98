"""`pipeline finetune fsd50k`: train, validation and evaluation sets as published."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.fsd50k import Fsd50k
from pipeline.training.finetuning_rounds import FinetuneResult, PublishedSetConfig, finetune


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneFsd50kConfig(PublishedSetConfig):
    """How a student is fine-tuned on FSD50K; the defaults are EfficientAT's recipe."""

    learning_rate: float = 7e-5
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""


def run(config: Annotated[FinetuneFsd50kConfig, Parameter(name="*")]) -> FinetuneResult:
    """Fine-tune on FSD50K: the best weights on the validation split are tested on the evaluation set.

    --source is the folder that holds FSD50K.ground_truth, FSD50K.dev_audio and FSD50K.eval_audio. RUN/split is a
    training run as `pipeline train-student` makes them; RUN/summary.json has the mAP on the evaluation set.

    Raises:
        PipelineError: the source, the settings or the checkpoint don't fit, or a run can't go on.
    """
    return finetune(config, Fsd50k())
