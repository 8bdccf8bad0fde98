"""The folder of a training run: what may be written there, and what is found there again.

RUN/config.toml holds the settings, metrics.jsonl and tensorboard/ the metrics, checkpoints/ what a resume needs,
last.safetensors and best.safetensors the weights for everybody else, failed.csv the clips that could not be read.
"""

import csv
import io
import logging
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.models.device import Precision
from pipeline.runtime.recipes import differences, to_toml
from pipeline.storage.files import (
    exists,
    is_remote,
    is_staged,
    join_path,
    local_path,
    publish_bytes,
    read_bytes,
    remove_staged,
)
from pipeline.training.checkpoints import CHECKPOINTS_FOLDER, load_newest_checkpoint, save_checkpoint, save_weights
from pipeline.training.loop import TrainingConfig
from pipeline.training.mirror import RunMirror

CONFIG_NAME, LAST_NAME, BEST_NAME, FAILED_NAME = "config.toml", "last.safetensors", "best.safetensors", "failed.csv"

LAUNCH_NAME = "launch.txt"
"""Which launch of ranks began the run: where torchrun or Ray Train starts them again, they go on with it."""

SUMMARY_NAME = "summary.json"
"""In the folder of a run of several rounds, such as the folds of `pipeline finetune`: what each round scored."""

_log = logging.getLogger(__name__)

# What a resumed run may do otherwise: none of it reaches the weights, but for more epochs, which only come later.
FREE_SETTINGS = frozenset(
    (
        *(
            "data",
            "store",
            "eval_data",
            "source",
            "only",
            "run",
            "resume",
            "epochs",
            "device",
            "compile",
            "ranks",
            "max_restarts",
            "address",
            "workers",
            "patience",
            "cache",
            "cache_size",
        ),
        *("max_failed", "evaluate_every", "checkpoint_minutes", "keep_checkpoints", "log_every"),
    )
)


class RunFolder:
    """One run's folder; nothing is written there before `begin`.

    Args:
        config: the run's settings.
        launch: what all starts of this run's ranks by one launcher have in common; None where it has none.

    Raises:
        UsageError: the folder holds something, `resume` is off, and it was not begun by the same launch.
        StorageError: it is a URL that can't be read or written.
    """

    def __init__(self, config: TrainingConfig, launch: str | None = None) -> None:
        self._launch, self._resume = launch, config.resume or _was_begun_by(config.run, launch)
        self._mirror = RunMirror(config.run, resume=self._resume) if is_remote(config.run) else None
        self.path = local_path(config.run) if self._mirror is None else self._mirror.path
        """Where its files are, on this machine."""
        self._config = config
        if not self._resume and self.path.is_dir() and not all(is_staged(path.name) for path in self.path.iterdir()):
            raise UsageError(
                f"--run {config.run}: is not empty. Add --resume to go on with what it holds, or choose another folder"
            )

    def newest_state(self) -> dict[str, Any] | None:
        """Load what the newest sound checkpoint holds; None where there is none yet.

        Raises:
            UsageError: the run had other settings.
            CheckpointError: there are checkpoints, but no sound one.
        """
        found = load_newest_checkpoint(self.path)
        if found is None:
            if self._resume:
                _log.info("%s holds no checkpoint yet: starting from the beginning", self.path)
            return None
        path, state = found
        if changed := differences(state["settings"], to_toml(self._config), free=FREE_SETTINGS):
            raise UsageError(f"--resume: {self.path} was made with other settings ({'; '.join(changed)}); use those")
        if state["torch_version"] != str(torch.__version__):
            versions = state["torch_version"], torch.__version__
            _log.warning("the run was made with torch %s, this is %s: it may go on with other rounding", *versions)
        _log.info("resuming after step %d, from %s", state["step"], path)
        return state

    def begin(self) -> None:
        """Write the settings down, and clear away what a killed process left half-written."""
        for folder in (self.path, self.path / CHECKPOINTS_FOLDER):
            remove_staged(folder)
        if self._launch is not None:
            publish_bytes(self.path / LAUNCH_NAME, self._launch.encode())
        publish_bytes(self.path / CONFIG_NAME, to_toml(self._config).encode())

    def publish(self) -> None:
        """Bring a run at a URL up to date there; a local one is so always."""
        if self._mirror is not None:
            self._mirror.publish()

    def close(self) -> None:
        """Bring a run at a URL up to date for the last time.

        Raises:
            StorageError: not all of it could be copied; the message says where it is.
        """
        if self._mirror is not None:
            self._mirror.close()

    def save(self, state: Mapping[str, Any]) -> Path:
        """Publish a checkpoint of `state`, whose `step` names it, and remove the oldest ones."""
        made_by = {"settings": to_toml(self._config), "torch_version": str(torch.__version__)}
        return save_checkpoint(self.path, state["step"], {**state, **made_by}, keep=self._config.keep_checkpoints)

    def save_weights(self, name: str, model: nn.Module, metadata: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Publish a model's weights for scoring, tagging and warm starts, floating-point ones as `dtype`."""
        weights = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in model.state_dict().items()
        }
        save_weights(self.path / name, weights, metadata)

    def list_failures(self, failures: Iterable[tuple[str, str, str]]) -> Path:
        """Write failed.csv: clip id, reason and detail of each clip that can't be used."""
        text = io.StringIO()
        csv.writer(text).writerows([("clip_id", "reason", "detail"), *failures])
        publish_bytes(self.path / FAILED_NAME, text.getvalue().encode())
        return self.path / FAILED_NAME


def _was_begun_by(run: str, launch: str | None) -> bool:
    noted = join_path(run, LAUNCH_NAME)
    return launch is not None and exists(noted) and read_bytes(noted).decode() == launch


def precision_of_run(run: str) -> Precision | None:
    """Returns the precision that a run was begun in; None where nothing was begun."""
    location = join_path(run, CONFIG_NAME)
    return tomllib.loads(read_bytes(location).decode()).get("precision") if exists(location) else None


def finished_weights(run: str) -> str:
    """Returns the location of a run's best weights, or of its last ones where nothing was evaluated.

    Raises:
        UsageError: the folder holds neither.
    """
    for name in (BEST_NAME, LAST_NAME):
        if exists(location := join_path(run, name)):
            return location
    raise UsageError(f"--run {run}: holds no weights. Give the folder that a training command got as --run")


def is_run(folder: str) -> bool:
    """Returns whether a folder or URL holds the weights of a run."""
    return any(exists(join_path(folder, name)) for name in (BEST_NAME, LAST_NAME))
