"""A timeline → events: when a class begins to be heard, and when it ends."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRule:
    """What counts as an event."""

    onset: np.ndarray
    """(classes,): probability that an event reaches somewhere, 0 to 1; infinite for a class that is not wanted."""
    offset: np.ndarray
    """(classes,): an event lasts for as long as the probability is not below this, before and behind that place."""
    shortest_seconds: float
    """Shorter ones are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A class that is heard from one time to another."""

    class_index: int
    start_seconds: float
    end_seconds: float
    probability: float
    """The highest in it."""


class EventFinder:
    """Finds the events of one sound with two thresholds (hysteresis), step by step.

    An event is a run of steps none of which is below the lower threshold, of which at least one reaches the upper one.
    It is given when it has ended.
    """

    def __init__(self, rule: EventRule) -> None:
        self._rule = rule
        classes = len(rule.onset)
        self._starts = np.full(classes, np.nan)
        """Seconds; NaN where the class is below its lower threshold."""
        self._peaks = np.zeros(classes)
        self._end = 0.0

    def add(self, start_seconds: float, end_seconds: float, probabilities: np.ndarray) -> Iterator[Event]:
        """Take the next step in, (classes,); yields the events that end before it."""
        goes_on = probabilities >= self._rule.offset
        yield from self._finish(~goes_on & ~np.isnan(self._starts))
        begins = goes_on & np.isnan(self._starts)
        self._starts[begins], self._peaks[begins] = start_seconds, 0.0
        self._peaks[goes_on] = np.maximum(self._peaks[goes_on], probabilities[goes_on])
        self._end = end_seconds

    def end(self) -> Iterator[Event]:
        """Yields the events that last to the sound's end."""
        yield from self._finish(~np.isnan(self._starts))

    def _finish(self, ended: np.ndarray) -> Iterator[Event]:
        long_enough = self._end - self._starts >= self._rule.shortest_seconds - 1e-6
        for index in np.flatnonzero(ended & long_enough & (self._peaks >= self._rule.onset)):
            yield Event(
                class_index=int(index),
                start_seconds=float(self._starts[index]),
                end_seconds=self._end,
                probability=float(self._peaks[index]),
            )
        self._starts[ended] = np.nan
