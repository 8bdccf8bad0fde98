"""`pipeline finetune dataset`: any dataset, from `pipeline ingest csv`, `pipeline ingest folder` or elsewhere."""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.models.weights import Task
from pipeline.training.finetuning import FinetuneConfig, labels_a_clip, train_on
from pipeline.training.run import RunResult

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDatasetConfig(FinetuneConfig):
    """How a student is fine-tuned on a dataset of one's own."""

    learning_rate: float = 6e-5
    """Peak learning rate for a batch of `optimizer.reference_batch` clips."""
    task: Literal["auto", "multi-label", "single-label"] = "auto"
    """single-label: each clip has exactly one class, they compete in a softmax, and accuracy decides. multi-label: any
    number of them, and mAP decides. auto: single-label where each clip to learn from has one."""


def run(config: Annotated[FinetuneDatasetConfig, Parameter(name="*")]) -> RunResult:
    """Fine-tune on any dataset with a manifest, such as `pipeline ingest csv` and `pipeline ingest folder` make.

    The run's folder receives what `pipeline train-student` writes; best.safetensors is best by accuracy or mAP on
    --eval-data.

    Raises:
        PipelineError: the settings, the dataset or the checkpoint don't fit, or the run can't go on.
    """
    manifest = read_manifest(config.data)
    eval_manifest = None if config.eval_data is None else read_manifest(config.eval_data)
    return train_on(config, manifest, eval_manifest, _task(config, manifest))


def _task(config: FinetuneDatasetConfig, manifest: Manifest) -> Task:
    if config.task != "auto":
        return config.task
    task: Task = "single-label" if (labels_a_clip(manifest) == 1).all() else "multi-label"
    _log.info("%s: taken as %s; --task says otherwise", config.data, task)
    return task
