"""Reads a training run again: settings, metrics, checkpoints, weights."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator

import torch

from pipeline.errors import CheckpointError, PipelineError, StorageUnavailableError
from pipeline.runtime.progress import METRICS_NAME
from pipeline.storage import files as storage
from pipeline.training.checkpoints import CHECKPOINTS_FOLDER, load_checkpoint
from pipeline.training.folder import CONFIG_NAME
from pipeline.verification.faults import Advance, Fault, Findings, move_aside

DAMAGED_CHECKPOINT, UNUSABLE_WEIGHTS = "damaged checkpoint", "unusable weights"
BAD_SETTINGS, BAD_LINE = "unusable settings", "damaged line"

_STEP = re.compile(r"step-(\d+)\.pt")


def verify_run(
    location: str, load_weights: Callable[[str], torch.nn.Module], *, on_files: Callable[[int], None], advance: Advance
) -> Findings:
    """Read all that a run keeps, and its rounds, where it is one of `pipeline finetune` that has some.

    Args:
        location: the folder, a path or a URL.
        load_weights: builds the model that a file of weights holds; raises PipelineError.
        on_files: told how many large files there are.
        advance: told of each that is done.

    Raises:
        StorageUnavailableError: the server can't be reached.
    """
    findings = Findings()
    rounds = _rounds(location)
    checkpoints: list[str] = []
    weights: list[str] = []
    for folder in ("", *rounds):
        findings.faults.extend(_settings_faults(location, f"{folder}{CONFIG_NAME}"))
        _verify_metrics(location, f"{folder}{METRICS_NAME}", findings, expected=bool(folder) or not rounds)
        checkpoints += _names_in(location, f"{folder}{CHECKPOINTS_FOLDER}/", ".pt")
        weights += _names_in(location, folder, ".safetensors")
    on_files(len(checkpoints) + len(weights))
    for name in checkpoints:
        findings.faults.extend(_checkpoint_faults(location, name))
        findings.looked_at["checkpoints"] += 1
        advance(1)
    for name in weights:
        findings.faults.extend(_weights_faults(location, name, load_weights))
        findings.looked_at["files of weights"] += 1
        advance(1)
    return findings


def _rounds(location: str) -> list[str]:
    """Returns the folders of a run's rounds, such as `fold1/`: those that have settings of their own."""
    below = [name.removesuffix(CONFIG_NAME) for name in storage.list_tree(location) if name.endswith(f"/{CONFIG_NAME}")]
    return [folder for folder in below if folder.count("/") == 1]


def _names_in(location: str, folder: str, suffix: str) -> list[str]:
    where = storage.join_path(location, folder) if folder else location
    return [f"{folder}{file.name}" for file in storage.list_files(where, suffix)]


def _settings_faults(location: str, name: str) -> Iterator[Fault]:
    path = storage.join_path(location, name)
    if not storage.exists(path):
        yield Fault(BAD_SETTINGS, name, detail="is not there")
        return
    try:
        tomllib.loads(storage.read_bytes(path).decode())
    except ValueError as error:
        yield Fault(BAD_SETTINGS, name, detail=str(error))


def _verify_metrics(location: str, name: str, findings: Findings, *, expected: bool) -> None:
    path = storage.join_path(location, name)
    if not storage.exists(path):
        findings.notes["run that has logged nothing"] += int(expected)
        return
    lines = storage.read_bytes(path).split(b"\n")
    if lines.pop():
        findings.notes["last line that was not finished"] += 1
    step = 0
    for number, line in enumerate(lines, start=1):
        fault, step = _line_fault(line, step)
        findings.looked_at["lines of metrics"] += 1
        if fault:
            findings.faults.append(Fault(BAD_LINE, name, detail=f"line {number} {fault}"))


def _line_fault(line: bytes, step: int) -> tuple[str, int]:
    """Returns what is wrong with a line of metrics, if anything; and the step that it belongs to."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"is no JSON ({error})", step
    if not isinstance(values, dict) or not all(isinstance(values.get(name), int) for name in ("step", "epoch")):
        return "has no step or no epoch", step
    if values["step"] < step:
        return f"is of step {values['step']}, after step {step}", step
    return "", values["step"]


def _checkpoint_faults(location: str, name: str) -> Iterator[Fault]:
    try:
        with storage.local_copy(storage.join_path(location, name)) as path:
            state = load_checkpoint(path)
    except StorageUnavailableError:
        raise
    except PipelineError as error:
        yield Fault(DAMAGED_CHECKPOINT, name, detail=str(error))
        return
    found = _STEP.search(name)
    if found is None or state.get("step") != int(found.group(1)):
        yield Fault(DAMAGED_CHECKPOINT, name, detail=f"holds the state after step {state.get('step')}")


def _weights_faults(location: str, name: str, load_weights: Callable[[str], torch.nn.Module]) -> Iterator[Fault]:
    try:
        load_weights(storage.join_path(location, name))
    except StorageUnavailableError:
        raise
    except PipelineError as error:
        yield Fault(UNUSABLE_WEIGHTS, name, detail=str(error))


def repair_run(location: str, findings: Findings) -> None:
    """Move damaged checkpoints into `.damaged`, so that a resume does not meet them; a sound one has to be left.

    Raises:
        CheckpointError: none is left: a resume would begin the training anew without a word.
    """
    damaged = dict.fromkeys(fault.file for fault in findings.faults if fault.check == DAMAGED_CHECKPOINT)
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in damaged):
        names = _names_in(location, f"{folder}/", ".pt")
        if damaged.keys() >= set(names):
            raise CheckpointError(
                f"{storage.join_path(location, folder)}: none of the {len(names)} checkpoints is sound, so nothing was "
                "moved. Put a sound copy back, or start again in another folder"
            )
    for name in damaged:
        target = move_aside(location, name)
        for fault in findings.faults:
            if fault.file == name:
                fault.repair = f"moved to {target}; a resume goes on from the checkpoint before"
