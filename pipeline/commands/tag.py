"""`pipeline tag`: what is to be heard in sound files, window by window."""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from pipeline.dataset.audio import decode, resample
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import DecodeError, PipelineError, TooManyFailuresError, UsageError
from pipeline.models.device import choose_device
from pipeline.models.loading import LoadedModel, load_model
from pipeline.redaction import redact
from pipeline.runtime.output import print_json, print_table
from pipeline.runtime.recipes import read_options
from pipeline.scoring.tagging import longest_seconds, tag_window
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class TagConfig:
    """Which files, and by which model."""

    files: tuple[str, ...]
    """Sound files, paths or URLs."""
    _: KW_ONLY
    checkpoint: str
    """File of weights, a path or URL, or a released model's name, such as mn10_as, which is fetched once. NAME=FILE
    names the model in a file that does not say it."""
    model: str | None = None
    """Registered name of the model in a file that does not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of that model, such as strides, se_dims or fmin, where they are not the name's."""
    classes: str | None = None
    """Class list of a file that does not say it, in the format of AudioSet's class_labels_indices.csv; AudioSet's
    unless given."""
    window: float | None = None
    """Length of the windows that a file is cut into, in seconds, above 0; without it a CNN hears the file as a
    whole."""
    top: int = 5
    """How many tags a window gets, the most probable first; 1 or more."""
    least: float = 0.0
    """Tags below this probability, 0 to 1, are left out."""
    json: bool = False
    """Print one JSON object a window instead of a table."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError("nothing to tag: name at least one sound file")
        if self.top < 1 or not 0 <= self.least <= 1:
            raise UsageError(f"top is {self.top} and least is {self.least}; choose 1 or more, and 0 to 1")
        if self.window is not None and not 0 < self.window < math.inf:
            raise UsageError(f"window is {self.window}; choose a number of seconds above 0, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggedWindow:
    """The tags of one window of a file."""

    file: str
    start_seconds: float
    end_seconds: float
    tags: tuple[tuple[str, float], ...]
    """(class name, probability 0 to 1), the most probable first."""


def run(config: Annotated[TagConfig, Parameter(name="*")]) -> list[TaggedWindow]:
    """Tag sound files with a checkpoint.

    A CNN hears a file as long as it is, at once; --window cuts it into windows, one after the other, and the last one
    is as long as what is left. A transformer hears no more than its length at once, 10 s for most, so that longer files
    are cut into windows of that. Files that can't be decoded are named, and the others are tagged all the same.

    Raises:
        PipelineError: the checkpoint can't be used, or a file could not be decoded.
    """
    model = load_model(
        config.checkpoint,
        model=config.model,
        options=read_options(config.model_options),
        classes=None if config.classes is None else read_vocabulary(config.classes),
        device=choose_device(config.device),
    )
    tagged: list[TaggedWindow] = []
    failed: list[str] = []
    for file in config.files:
        try:
            windows = list(_tag_file(file, model, config))
        except DecodeError as error:
            failed.append(f"{file}: {error}")
            continue
        _show(windows, config.json)
        tagged += windows
    if failed:
        raise TooManyFailuresError(f"{len(failed)} of {len(config.files)} files can't be decoded: {'; '.join(failed)}")
    return tagged


def _tag_file(file: str, model: LoadedModel, config: TagConfig) -> Iterator[TaggedWindow]:
    rate = model.sample_rate_hz
    sound = decode(storage.read_bytes(file))
    samples = resample(sound.samples, sound.sample_rate_hz, rate)
    seconds = min(config.window or math.inf, longest_seconds(model))
    length = len(samples) if math.isinf(seconds) else max(1, round(seconds * rate))
    for start in range(0, len(samples), length):
        window = samples[start : start + length]
        try:
            probabilities = tag_window(model, window)  # (classes,)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{file}: {len(window) / rate:.0f} s are too long for the memory of {config.device}. Give --window 10"
            ) from error
        best = np.argsort(-probabilities, kind="stable")[: config.top]
        yield TaggedWindow(
            file=redact(file),
            start_seconds=start / rate,
            end_seconds=(start + len(window)) / rate,
            tags=tuple(
                (model.vocabulary.names[index], float(probabilities[index]))
                for index in best
                if probabilities[index] >= config.least
            ),
        )


def _show(windows: list[TaggedWindow], as_json: bool) -> None:
    if as_json:
        for window in windows:
            line = {
                "file": window.file,
                "start_seconds": round(window.start_seconds, 3),
                "end_seconds": round(window.end_seconds, 3),
                "tags": {name: round(probability, 4) for name, probability in window.tags},
            }
            print_json(line)
        return
    table = Table("seconds", "tag", "probability", title=Text(windows[0].file), title_justify="left")
    table.columns[2].justify = "right"
    for window in windows:
        for order, (name, probability) in enumerate(window.tags):
            when = f"{window.start_seconds:.1f} to {window.end_seconds:.1f}" if order == 0 else ""
            table.add_row(when, Text(name), f"{probability:.3f}")
    print_table(table)
