"""The learning-rate curve is upstream's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.schedule import ScheduleConfig, learning_rate_multiplier


def test_equals_upstreams_curve(golden_dir) -> None:
    golden = json.loads((golden_dir / "lr_multiplier.json").read_text())["epoch_0_to_199"]
    ours = [learning_rate_multiplier(epoch, ScheduleConfig()) for epoch in range(200)]
    assert ours == pytest.approx(golden, rel=1e-12)


@given(epoch=st.floats(0, 300), factor=st.floats(0.01, 2))
def test_a_scaled_curve_is_the_same_curve_stretched(epoch, factor) -> None:
    recipe, short = ScheduleConfig(), ScheduleConfig().scaled(factor)
    assert learning_rate_multiplier(epoch * factor, short) == pytest.approx(
        learning_rate_multiplier(epoch, recipe), rel=1e-6
    )


@given(epoch=st.floats(0, 80))
def test_the_curve_never_falls_before_the_way_down(epoch) -> None:
    config = ScheduleConfig()
    assert learning_rate_multiplier(epoch, config) <= learning_rate_multiplier(min(epoch + 0.1, 80), config) <= 1


def test_no_warmup_starts_at_full_rate() -> None:
    assert learning_rate_multiplier(0, ScheduleConfig(warmup_epochs=0)) == 1


def test_no_way_down_drops_at_its_start() -> None:
    config = ScheduleConfig(ramp_down_epochs=0)
    assert learning_rate_multiplier(80, config) == 1
    assert learning_rate_multiplier(80.5, config) == 0.01


@pytest.mark.parametrize("wrong", [{"warmup_epochs": -1}, {"last_multiplier": 1.5}, {"ramp_down_epochs": -2}])
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="schedule"):
        ScheduleConfig(**wrong)
