"""Saves and restores a training run: whole files, newest sound one first; and the weights that other commands load."""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.storage.files import list_files, publish

CHECKPOINTS_FOLDER = "checkpoints"

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})\.pt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns the place of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS_FOLDER / f"step-{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """List a run's finished checkpoints, oldest first."""
    folder = run / CHECKPOINTS_FOLDER
    names = [file.name for file in list_files(folder, ".pt") if _NAME.fullmatch(file.name)]
    return sorted((folder / name for name in names), key=_step_of)


def save_checkpoint(run: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Publish a checkpoint, then remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: optimizer steps so far.
        state: nested dicts and lists of tensors, numbers, strings and None: what `weights_only` loading takes.
        keep: how many to keep, at least 1. The older ones are there in case the newest one's disk block rots.
    """
    path = checkpoint_path(run, step)
    with publish(path) as staged:
        torch.save(dict(state), staged)
    # A run that resumed behind a damaged checkpoint passes it by again: its number is then no longer the newest.
    for old in [other for other in list_checkpoints(run) if _step_of(other) <= step][:-keep]:
        old.unlink()
    return path


def load_newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest checkpoint that is sound; a damaged one is passed over with a warning.

    Returns:
        Its path and its state, tensors on the CPU; None where the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, but none is sound.
    """
    paths = list_checkpoints(run)
    for path in reversed(paths):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s; trying the one before", error)
    if paths:
        raise CheckpointError(
            f"{run / CHECKPOINTS_FOLDER}: none of the {len(paths)} checkpoints can be read. "
            "Start again in another folder (--run), or put a sound copy back"
        )
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load one checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: it is cut short or damaged, holds more than tensors and plain values, or numbers that are not
            finite: no training could go on from those.
    """
    try:
        # torch.load does not look at the checksums in its own zip container, so a flipped bit would go unseen.
        with zipfile.ZipFile(path) as container:
            damaged = container.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: its entry {damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from error
    if bad := next((where for where, tensor in _tensors(state) if not bool(tensor.isfinite().all())), None):
        raise CheckpointError(f"{path}: {bad} holds numbers that are not finite")
    return state


def _tensors(state: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the floating-point tensors of a state, with their places."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield where, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors(value, f"{where}.{key}".removeprefix("."))


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Publish a model's weights as safetensors, for scoring, tagging and warm starts.

    Args:
        path: ends in `.safetensors`.
        weights: key → tensor; copied to the CPU.
        metadata: what made them; values other than strings are written as JSON.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with publish(path) as staged:
        save_file(tensors, staged, metadata=texts)
        staged.chmod(0o644)  # safetensors makes files that only their owner can read


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found.group(1))
