"""Tells what a folder is meant to be, also where the file that says so is lost."""

from typing import Literal

from pipeline.dataset.manifest import MANIFEST_NAME
from pipeline.errors import PipelineError
from pipeline.logits.store import STORE_NAME, part_files
from pipeline.runtime.progress import METRICS_NAME
from pipeline.storage import files as storage
from pipeline.training.checkpoints import CHECKPOINTS_FOLDER
from pipeline.training.folder import CONFIG_NAME

Kind = Literal["dataset", "store", "run"]

_MARKS: dict[str, Kind] = {MANIFEST_NAME: "dataset", STORE_NAME: "store", CONFIG_NAME: "run", METRICS_NAME: "run"}


def kind_of(path: str) -> Kind:
    """Returns `dataset`, `store` or `run`: by the file that each has to have, or else by what they consist of.

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
        return "store"
    if not storage.exists(path):
        raise PipelineError(f"{path}: there is nothing here. Give the folder of a dataset, a logit store or a run.")
    raise PipelineError(
        f"{path}: is neither a dataset ({MANIFEST_NAME}), a logit store ({STORE_NAME}) nor a run ({CONFIG_NAME})."
    )
