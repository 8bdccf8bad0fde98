"""Tells what a folder is meant to be, also where the file that says so is lost."""

from typing import Literal

from pipeline.dataset.manifest import MANIFEST_NAME
from pipeline.embeddings.store import STAMP_NAME, holds_embeddings
from pipeline.errors import PipelineError
from pipeline.logits.store import STORE_NAME, part_files
from pipeline.runtime.progress import METRICS_NAME
from pipeline.storage import files as storage
from pipeline.training.checkpoints import CHECKPOINTS_FOLDER
from pipeline.training.folder import CONFIG_NAME

Kind = Literal["dataset", "store", "embeddings", "run"]

_MARKS: dict[str, Kind] = {
    MANIFEST_NAME: "dataset",
    STORE_NAME: "store",
    STAMP_NAME: "embeddings",
    CONFIG_NAME: "run",
    METRICS_NAME: "run",
}


def kind_of(path: str) -> Kind:
    """Returns `dataset`, `store`, `embeddings` or `run`: by the file that each has, or else by what it consists of.

    Raises:
        PipelineError: it is none of them.
    """
    for name, kind in _MARKS.items():
        if storage.exists(storage.join_path(path, name)):
            return kind
    if storage.list_files(path, ".tar"):
        return "dataset"
    if storage.list_files(storage.join_path(path, CHECKPOINTS_FOLDER), ".pt"):
        return "run"
    if part_files(path):
        return "embeddings" if holds_embeddings(path) else "store"
    if not storage.exists(path):
        raise PipelineError(
            f"{path}: there is nothing here. Give the folder of a dataset, a logit store, embeddings or a run."
        )
    raise PipelineError(
        f"{path}: is neither a dataset ({MANIFEST_NAME}), a logit store ({STORE_NAME}), embeddings ({STAMP_NAME}) nor "
        f"a run ({CONFIG_NAME})."
    )
