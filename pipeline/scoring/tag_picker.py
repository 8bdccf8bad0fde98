"""What was heard → what is told of it: the best tags of a window, or where each class begins and ends."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.scoring.events import Event, EventFinder, EventRule
from pipeline.scoring.listening import Heard
from pipeline.scoring.tagged_windows import TaggedWindow


class TagPicker:
    """Chooses what is told of what was heard.

    Args:
        names: of the classes.
        least: (classes,), probability that a class has to reach; infinite for one that is left out.
        top: how many tags a window gets.
        rule: of events, which then take the place of windows.
    """

    def __init__(self, names: tuple[str, ...], *, least: np.ndarray, top: int, rule: EventRule | None) -> None:
        self._names, self._least, self._top, self._rule = names, least, top, rule

    def pick(
        self, heard: Iterable[Heard], name: Callable[[int], str], sample_rate_hz: int
    ) -> Iterator[tuple[int, TaggedWindow | str]]:
        """Yields (number of the sound, what is told), and at each sound's end, why it can't be decoded to its end."""
        finder = self._finder()
        for step in heard:
            file = name(step.sound)
            if step.cell is None:
                for event in finder.end() if finder is not None else ():
                    yield step.sound, self._event(file, event)
                finder = self._finder()
                yield step.sound, step.failure
                continue
            start, end = step.cell.start / sample_rate_hz, step.cell.end / sample_rate_hz
            if finder is not None:
                for event in finder.add(start, end, step.cell.probabilities):
                    yield step.sound, self._event(file, event)
            else:
                yield step.sound, self._window(file, start, end, step.cell.probabilities)

    def _finder(self) -> EventFinder | None:
        return None if self._rule is None else EventFinder(self._rule)

    def _window(self, file: str, start: float, end: float, probabilities: np.ndarray) -> TaggedWindow:
        counts = np.flatnonzero(probabilities >= self._least)
        best = counts[np.argsort(-probabilities[counts], kind="stable")][: self._top]
        tags = tuple((self._names[index], float(probabilities[index])) for index in best)
        return TaggedWindow(file=file, start_seconds=start, end_seconds=end, tags=tags)

    def _event(self, file: str, event: Event) -> TaggedWindow:
        return TaggedWindow(
            file=file,
            start_seconds=event.start_seconds,
            end_seconds=event.end_seconds,
            tags=((self._names[event.class_index], event.probability),),
        )
