"""A sound that comes part by part → windows of it; what overlapping windows say → one timeline."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlan:
    """How sounds are cut into windows, in samples."""

    length: int | None
    """Of a window; None takes a sound whole, if it is not longer than `longest_whole`."""
    hop: int
    """From the beginning of one window to the next, where there are several."""
    cell: int
    """A step of the timeline; `hop` is a multiple of it."""
    long_length: int = 0
    """Length of the windows of a sound that is too long to be taken whole."""
    longest_whole: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of a sound."""

    start: int
    """Its first sample in the sound."""
    samples: np.ndarray
    """(samples,), float32."""
    is_last: bool
    """Whether the sound ends with it, as far as that is known."""


class WindowCutter:
    """Cuts one sound into windows.

    The last window is as long as what is left, and there is none whose samples the one before holds all.
    """

    def __init__(self, plan: WindowPlan) -> None:
        self._length, self.hop, self.cell = plan.length, plan.hop, plan.cell
        self._plan = plan
        self._parts: list[np.ndarray] = []
        self._held = 0
        """Samples of the parts."""
        self._start = 0
        """Where the next window begins, which is where the parts begin."""
        self._covered = 0
        """Up to where windows were given."""

    def push(self, samples: np.ndarray) -> Iterator[Window]:
        """Take (samples,) in; yields the windows that are complete."""
        self._parts.append(samples)
        self._held += len(samples)
        if self._length is None and self._held > self._plan.longest_whole:
            self._length = self.hop = self.cell = self._plan.long_length
        if self._length is None or self._held < self._length:
            return
        held = np.concatenate(self._parts)
        while len(held) >= self._length:
            yield Window(start=self._start, samples=held[: self._length], is_last=False)
            self._covered = self._start + self._length
            held = held[self.hop :]
            self._start += self.hop
        self._parts, self._held = [held.copy()], len(held)  # let go of the rest

    def end(self) -> Iterator[Window]:
        """Yields what is left."""
        held = np.concatenate(self._parts) if self._parts else np.empty(0, np.float32)
        if self._start + len(held) > self._covered:
            if self._length is None:
                self.hop = self.cell = len(held)
            yield Window(start=self._start, samples=held, is_last=True)

    @property
    def end_sample(self) -> int:
        """Where the sound ends, as far as it came."""
        return self._start + self._held


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A step of a timeline."""

    start: int
    end: int
    """In samples; of the last one where the sound ends."""
    probabilities: np.ndarray
    """(classes,), the mean over the windows that cover it."""


@dataclass(slots=True)
class Timeline:
    """The mean of what overlapping windows say of each step of a sound."""

    _sums: dict[int, np.ndarray] = field(default_factory=dict)
    """Cell → (classes,)."""
    _counts: dict[int, int] = field(default_factory=dict)
    _end: int = 0

    def add(self, window: Window, scores: np.ndarray, *, hop: int, cell: int) -> Iterator[Cell]:
        """Take in what is said of a window; yields the cells that no later window covers.

        Args:
            window: in the order of their beginnings.
            scores: (1, classes) for the whole window, or (frames, classes), one for each cell from its beginning on.
            hop: of the windows, in samples.
            cell: in samples.
        """
        first = window.start // cell
        length = len(window.samples)
        covered = max(1, -(-length // cell) if window.is_last else (length + cell // 2) // cell)
        if len(scores) == 1:
            scores = np.repeat(scores, covered, axis=0)
        for number, score in enumerate(scores[:covered], start=first):
            self._sums[number] = self._sums.get(number, 0) + score
            self._counts[number] = self._counts.get(number, 0) + 1
        self._end = max(self._end, window.start + length)
        if not window.is_last:
            yield from self._finish(before=(window.start + hop) // cell, cell=cell)

    def end(self, *, cell: int) -> Iterator[Cell]:
        """Yields what is left once no window comes any more."""
        yield from self._finish(before=None, cell=cell)

    def _finish(self, before: int | None, cell: int) -> Iterator[Cell]:
        for number in sorted(number for number in self._sums if before is None or number < before):
            is_last = before is None and len(self._sums) == 1
            end = self._end if is_last else min((number + 1) * cell, self._end)
            start = number * cell
            probabilities = self._sums.pop(number) / self._counts.pop(number)
            if start < end:
                yield Cell(start=start, end=end, probabilities=probabilities)
