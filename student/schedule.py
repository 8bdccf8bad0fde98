"""The learning rate over a run: a soft start, a plateau, a straight way down, a low end."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The curve of the recipe, made for 200 epochs."""

    warmup_epochs: float = 8.0
    """Length of the soft start, in epochs; 0 is none."""

    ramp_down_start_epoch: float = 80.0
    """Where the way down begins, in epochs."""

    ramp_down_epochs: float = 95.0
    """Length of the way down, in epochs."""

    last_multiplier: float = 0.01
    """Share of the learning rate that is left at the end, 0 to 1."""

    first_epoch: float = 0.5
    """The soft start takes an earlier epoch for this one, because epoch 0 itself would hardly learn."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        lengths = (self.warmup_epochs, self.ramp_down_start_epoch, self.ramp_down_epochs, self.first_epoch)
        if min(lengths) < 0 or not 0 <= self.last_multiplier <= 1:
            raise ValueError(f"schedule: epochs must be 0 or more and last_multiplier 0 to 1, not {self}")

    def scaled(self, factor: float) -> "ScheduleConfig":
        """Stretch the curve along the epochs: a run of 20 epochs instead of 200 takes `scaled(0.1)`."""
        return dataclasses.replace(
            self,
            warmup_epochs=self.warmup_epochs * factor,
            ramp_down_start_epoch=self.ramp_down_start_epoch * factor,
            ramp_down_epochs=self.ramp_down_epochs * factor,
            first_epoch=self.first_epoch * factor,
        )


def learning_rate_multiplier(epoch: float, config: ScheduleConfig) -> float:
    """Returns the factor of the learning rate at an epoch.

    Args:
        epoch: 0 at the start; whole numbers give the recipe's steps, fractions a smooth curve.
        config: the curve.

    Returns:
        0 to 1.

    The soft start is that of Laine and Aila 2016, arXiv:1610.02242, Section 2.1.
    """
    return _warmup(epoch, config) * _ramp_down(epoch, config)


def _warmup(epoch: float, config: ScheduleConfig) -> float:
    if epoch >= config.warmup_epochs:
        return 1.0
    missing = 1 - min(max(epoch, config.first_epoch) / config.warmup_epochs, 1.0)
    return math.exp(-5.0 * missing**2)


def _ramp_down(epoch: float, config: ScheduleConfig) -> float:
    descended = epoch - config.ramp_down_start_epoch
    if descended <= 0:
        return 1.0
    if descended >= config.ramp_down_epochs:
        return config.last_multiplier
    return config.last_multiplier + (1 - config.last_multiplier) * (1 - descended / config.ramp_down_epochs)
