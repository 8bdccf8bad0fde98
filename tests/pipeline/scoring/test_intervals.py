import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.scoring.intervals import BootstrapConfig, Difference, Interval


def difference(gain: float, low: float, high: float) -> Difference:
    return Difference(system="a", baseline="b", mean_average_precision=gain, interval=Interval(low, high))


def test_an_interval_holds_the_middle_95_percent_of_the_replicates_that_have_a_score() -> None:
    replicates = np.append(np.random.default_rng(0).permutation(201) / 200, np.nan)
    interval = Interval.of(replicates)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.025, 0.975))
    assert Interval.of(np.full(3, np.nan)) is None
    assert Interval.of(np.empty(0)) is None


def test_a_gain_is_beyond_chance_where_its_interval_leaves_zero_out() -> None:
    assert difference(0.05, 0.01, 0.09).beyond_chance
    assert difference(-0.05, -0.09, -0.01).beyond_chance
    assert not difference(0.05, -0.01, 0.11).beyond_chance
    assert not difference(0.0, 0.0, 0.0).beyond_chance


def test_the_line_names_the_higher_one_first() -> None:
    assert str(difference(0.05, -0.01, 0.11)) == (
        "a above b: mAP +0.0500, 95 % interval -0.0100 to +0.1100: within chance"
    )
    assert str(difference(-0.05, -0.09, -0.01)) == (
        "b above a: mAP +0.0500, 95 % interval +0.0100 to +0.0900: beyond chance"
    )


@pytest.mark.parametrize("wrong", [{"bootstrap": -1}, {"seed": -1}])
def test_negative_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="choose 0 or more"):
        BootstrapConfig(**wrong)
