import numpy as np
import pytest

from pipeline.scoring.windows import Timeline, WindowCutter, WindowPlan


def cut(samples: int, plan: WindowPlan, part: int = 7) -> list[tuple[int, int, bool]]:
    cutter, sound = WindowCutter(plan), np.arange(samples, dtype=np.float32)
    windows = [one for start in range(0, samples, part) for one in cutter.push(sound[start : start + part])]
    windows += cutter.end()
    for window in windows:
        np.testing.assert_array_equal(window.samples, sound[window.start :][: len(window.samples)])
    return [(window.start, len(window.samples), window.is_last) for window in windows]


@pytest.mark.parametrize("part", [1, 7, 100])
def test_windows_one_after_the_other_end_with_what_is_left(part: int) -> None:
    plan = WindowPlan(length=10, hop=10, cell=10)
    assert cut(23, plan, part) == [(0, 10, False), (10, 10, False), (20, 3, True)]
    assert cut(20, plan, part) == [(0, 10, False), (10, 10, False)]
    assert cut(3, plan, part) == [(0, 3, True)]


def test_no_window_holds_only_what_the_one_before_held() -> None:
    assert cut(20, WindowPlan(length=10, hop=5, cell=5)) == [(0, 10, False), (5, 10, False), (10, 10, False)]
    assert cut(21, WindowPlan(length=10, hop=5, cell=5))[-1] == (15, 6, True)


def test_a_sound_is_whole_unless_it_is_too_long() -> None:
    plan = WindowPlan(length=None, hop=10, cell=10, long_length=10, longest_whole=25)
    assert cut(25, plan) == [(0, 25, True)]
    assert cut(26, plan) == [(0, 10, False), (10, 10, False), (20, 6, True)]


@pytest.mark.parametrize(
    ("length", "hop", "samples"), [(10, 10, 33), (10, 5, 40), (10, 5, 33), (9, 3, 30), (10, 4, 41)]
)
def test_a_timeline_covers_the_sound_without_gaps_and_is_the_mean_of_the_windows(
    length: int, hop: int, samples: int
) -> None:
    cutter, timeline = WindowCutter(WindowPlan(length=length, hop=hop, cell=hop)), Timeline()
    windows = [*cutter.push(np.zeros(samples, np.float32)), *cutter.end()]
    cells = []
    for window in windows:
        cells += timeline.add(window, np.array([[float(window.start)]]), hop=hop, cell=hop)
    cells += timeline.end(cell=hop)
    assert [cell.start for cell in cells] == list(range(0, samples, hop))[: len(cells)]
    assert [cell.end for cell in cells[:-1]] == [cell.start for cell in cells[1:]]
    assert cells[-1].end == samples
    for cell in cells[:-1]:
        middle = cell.start + hop / 2
        covering = [one.start for one in windows if one.start <= middle <= one.start + len(one.samples)]
        assert cell.probabilities[0] == pytest.approx(np.mean(covering)), cell


def test_a_models_own_frames_are_steps_of_the_timeline() -> None:
    cutter, timeline = WindowCutter(WindowPlan(length=8, hop=4, cell=2)), Timeline()
    cells = []
    for window in [*cutter.push(np.zeros(15, np.float32)), *cutter.end()]:
        frames = window.start + 2 * np.arange(5.0)[:, None]  # one more than fits, as padding gives
        cells += timeline.add(window, frames, hop=4, cell=2)
    cells += timeline.end(cell=2)
    assert [(cell.start, cell.end, cell.probabilities[0]) for cell in cells] == [
        (start, min(start + 2, 15), start) for start in range(0, 16, 2)
    ]
