"""Parts of sounds → what models hear in them, step by step: windows of several sounds go through a model together."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from pipeline.dataset.audio import resample
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.decoding.parts_ahead import SoundPart
from pipeline.errors import UsageError
from pipeline.models.weights import Task
from pipeline.scoring.windows import Cell, Timeline, Window, WindowCutter, WindowPlan

_BATCH_SECONDS = 10.0
"""For each of the windows that go through a model together, on average, unless one alone is longer than all that."""
LONGEST_WHOLE_SECONDS = 300.0
"""A longer sound is not heard in one piece unless somebody asks for windows of that length."""


class WindowModel(Protocol):
    """A model that tags windows of sound."""

    name: str
    sample_rate_hz: int
    input_seconds: float
    longest_seconds: float
    """How much it can hear at once; may be infinite."""
    frame_samples: int | None
    """The step of the timeline that it gives by itself; None where it gives none."""
    is_fully_convolutional: bool
    """Whether the logits of a window are the mean of those of its frames."""
    on_gpu: bool
    """Whether it computes elsewhere than on the CPU, and so wants large batches."""
    vocabulary: Vocabulary
    task: Task

    def logits(self, windows: np.ndarray) -> np.ndarray:
        """(batch, samples) float32 → (batch, classes)."""
        ...

    def frame_logits(self, windows: np.ndarray) -> np.ndarray:
        """(batch, samples) float32 → (batch, frames, classes)."""
        ...


class Ensemble:
    """Several models of the same classes: the mean of their logits.

    They share the decoding, at the highest of their rates; a model of another rate has each window resampled.

    Raises:
        UsageError: their classes differ.
    """

    def __init__(self, models: Sequence[WindowModel]) -> None:
        first = models[0]
        for other in models[1:]:
            if other.vocabulary.sha256 != first.vocabulary.sha256:
                raise UsageError(
                    f"--checkpoint: {first.name} knows {len(first.vocabulary)} classes and {other.name} "
                    f"{len(other.vocabulary)} other ones; an ensemble needs the same"
                )
        self._models = models
        self.vocabulary = first.vocabulary
        self.task: Task = "single-label" if all(one.task == "single-label" for one in models) else "multi-label"
        self.sample_rate_hz = max(model.sample_rate_hz for model in models)
        self.longest_seconds = min(model.longest_seconds for model in models)
        self.input_seconds = min(model.input_seconds for model in models)
        self.on_gpu = any(model.on_gpu for model in models)
        steps = {model.frame_samples and model.frame_samples / model.sample_rate_hz for model in models}
        alike = len(steps) == 1 and len({model.sample_rate_hz for model in models}) == 1
        self.frame_samples = first.frame_samples if alike else None
        """The step that all of them give by themselves; None where they differ."""
        self.is_fully_convolutional = alike and all(model.is_fully_convolutional for model in models)

    def probabilities(self, windows: np.ndarray, *, frames: bool) -> np.ndarray:
        """Returns (batch, frames, classes), 0 to 1; one frame for the whole window unless `frames` are asked for.

        Args:
            windows: (batch, samples) float32 at `sample_rate_hz`.
            frames: whether to keep the frames of the models' last maps apart.
        """
        logits = np.mean([self._logits(model, windows, frames=frames) for model in self._models], axis=0)
        if self.task == "single-label":
            exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return exponents / exponents.sum(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-logits))

    def _logits(self, model: WindowModel, windows: np.ndarray, *, frames: bool) -> np.ndarray:
        if model.sample_rate_hz != self.sample_rate_hz:
            windows = np.stack([resample(one, self.sample_rate_hz, model.sample_rate_hz) for one in windows])
        return model.frame_logits(windows) if frames else model.logits(windows)[:, None]


def plan_windows(model: Ensemble, *, window: float | None, hop: float | None, frames: bool) -> WindowPlan:
    """Returns how sounds are cut.

    Args:
        model: says what it can hear at once.
        window: seconds; None is the whole sound, or what a model can hear at once.
        hop: seconds; None is `window`: windows one after the other.
        frames: whether the steps of the timeline are the model's own; windows are then brought to a multiple of them.
    """
    rate = model.sample_rate_hz
    longest = min(window or math.inf, model.longest_seconds)
    cell = model.frame_samples if frames else None
    if math.isinf(longest) and (hop is not None or frames):
        longest = model.input_seconds
    if math.isinf(longest):
        long = round(model.input_seconds * rate)
        whole = round(LONGEST_WHOLE_SECONDS * rate)
        return WindowPlan(length=None, hop=long, cell=long, long_length=long, longest_whole=whole)
    length = max(1, round(longest * rate))
    step = length if hop is None else max(1, round(hop * rate))
    if cell is not None:
        length, step = (max(cell, round(samples / cell) * cell) for samples in (length, step))
    return WindowPlan(length=length, hop=min(step, length), cell=cell or min(step, length))


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A step of a sound's timeline, or the sound's end."""

    sound: int
    """Its number."""
    cell: Cell | None
    """None at the end."""
    failure: str = ""
    """Why the sound could not be decoded to its end."""


class _Listener:
    """One sound while it is heard."""

    def __init__(self, number: int, plan: WindowPlan) -> None:
        self.number = number
        self.cutter, self.timeline = WindowCutter(plan), Timeline()


_Waiting = tuple[_Listener, Window | None, str]
"""A window that no model has heard yet, or, without one, the end of its sound, and why it ended early."""


def listen(
    parts: Iterable[SoundPart], model: Ensemble, plan: WindowPlan, *, batch_size: int, frames: bool
) -> Iterator[Heard]:
    """Yields what is heard, sound by sound.

    Args:
        parts: of one sound after the other, each with its end.
        model: hears them.
        plan: how they are cut.
        batch_size: windows that go through the model together; with 1 each is heard as soon as it is complete.
        frames: whether to keep the frames of the models' last maps apart.

    Raises:
        PipelineError: the windows are too long for the memory.
    """
    waiting: list[_Waiting] = []
    listener: _Listener | None = None
    for part in parts:
        listener = listener or _Listener(part.sound, plan)
        if part.is_end:
            waiting += [(listener, window, "") for window in listener.cutter.end()]
            waiting.append((listener, None, part.failure))
        else:
            for window in listener.cutter.push(part.samples):
                waiting.append((listener, window, ""))
                if _is_full(waiting, batch_size, model.sample_rate_hz):
                    yield from _hear(waiting, model, frames=frames)
                    waiting = []
        if part.is_end:
            listener = None
            if _is_full(waiting, batch_size, model.sample_rate_hz):
                yield from _hear(waiting, model, frames=frames)
                waiting = []
    yield from _hear(waiting, model, frames=frames)


def _is_full(waiting: Sequence[_Waiting], batch_size: int, rate: int) -> bool:
    lengths = [len(window.samples) for _, window, _ in waiting if window is not None]
    return (
        len(lengths) >= batch_size or sum(lengths) > _BATCH_SECONDS * batch_size * rate or len(waiting) > 4 * batch_size
    )


def _hear(waiting: Sequence[_Waiting], model: Ensemble, *, frames: bool) -> Iterator[Heard]:
    windows = [(place, window) for place, (_, window, _) in enumerate(waiting) if window is not None]
    scores: dict[int, np.ndarray] = {}
    for _, alike in groupby(sorted(windows, key=lambda one: len(one[1].samples)), key=lambda one: len(one[1].samples)):
        places, of_one_length = zip(*alike, strict=True)
        found = model.probabilities(np.stack([window.samples for window in of_one_length]), frames=frames)
        scores.update(zip(places, found, strict=True))
    for place, (listener, window, failure) in enumerate(waiting):
        cutter, timeline = listener.cutter, listener.timeline
        if window is None:
            cells = timeline.end(cell=cutter.cell)
        else:
            cells = timeline.add(window, scores[place], hop=cutter.hop, cell=cutter.cell)
        for cell in cells:
            yield Heard(sound=listener.number, cell=cell)
        if window is None:
            yield Heard(sound=listener.number, cell=None, failure=failure)
