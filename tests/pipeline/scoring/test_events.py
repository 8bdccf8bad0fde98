import numpy as np

from pipeline.scoring.events import EventFinder, EventRule


def find(probabilities: list[list[float]], shortest: float = 0.0, onset: tuple[float, ...] = (0.5,)) -> list[tuple]:
    low = np.array([0.5 * one for one in onset])
    finder = EventFinder(EventRule(onset=np.array(onset), offset=low, shortest_seconds=shortest))
    events = []
    for step, row in enumerate(probabilities):
        events += finder.add(step * 0.5, step * 0.5 + 0.5, np.array(row))
    events += finder.end()
    return [(one.class_index, one.start_seconds, one.end_seconds, one.probability) for one in events]


def test_an_event_lasts_while_the_lower_threshold_is_kept_before_and_behind_its_peak() -> None:
    assert find([[0.1], [0.3], [0.6], [0.3], [0.7], [0.26], [0.2]]) == [(0, 0.5, 3.0, 0.7)]


def test_what_never_reaches_the_upper_threshold_is_no_event() -> None:
    assert find([[0.3], [0.49], [0.3], [0.0]]) == []


def test_short_events_are_dropped_and_the_last_ends_with_the_sound() -> None:
    heard = [[0.9], [0.0], [0.9], [0.9]]
    assert find(heard) == [(0, 0.0, 0.5, 0.9), (0, 1.0, 2.0, 0.9)]
    assert find(heard, shortest=0.6) == [(0, 1.0, 2.0, 0.9)]
    assert find(heard, shortest=1.0) == [(0, 1.0, 2.0, 0.9)]


def test_each_class_has_thresholds_of_its_own_and_may_have_none() -> None:
    heard = [[0.3, 0.3, 1.0], [0.0, 0.0, 1.0]]
    assert find(heard, onset=(0.2, 0.5, np.inf)) == [(0, 0.0, 0.5, 0.3)]
