"""What a score, or the difference of two, owes to which clips there happened to be: intervals from resampled clips."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.errors import UsageError

CONFIDENCE = 0.95
"""Share of the replicates that lie within an interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BootstrapConfig:
    """How often the clips are resampled."""

    bootstrap: int = 1000
    """How often the clips are drawn anew, with replacement, for the 95 % intervals of mAP and of differences; 0 is
    never. All systems are scored on the same draws."""
    seed: int = 0
    """Decides those draws, 0 or more."""

    def __post_init__(self) -> None:
        if self.bootstrap < 0 or self.seed < 0:
            raise UsageError(f"bootstrap is {self.bootstrap} and seed {self.seed}; choose 0 or more")


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the middle 95 % of the replicates lie."""

    low: float
    high: float

    @classmethod
    def of(cls, replicates: np.ndarray) -> Self | None:
        """Returns the interval of values, (replicates,); None where there are none, or none that is a number."""
        known = replicates[~np.isnan(replicates)]
        if not len(known):
            return None
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(known, (tail, 1 - tail))
        return cls(float(low), float(high))

    def __contains__(self, value: float) -> bool:
        """Tell whether a value lies within, the ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What one system's mAP is above another's on the same clips."""

    system: str
    baseline: str
    mean_average_precision: float
    """-1 to 1."""
    interval: Interval
    """Of the differences within each replicate."""

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves zero out."""
        return 0.0 not in self.interval

    def __str__(self) -> str:
        """Say it in one line, the higher of the two first."""
        gain, low, high = self.mean_average_precision, self.interval.low, self.interval.high
        first, second = self.system, self.baseline
        if gain < 0:
            gain, low, high, first, second = -gain, -high, -low, second, first
        verdict = "beyond chance" if self.beyond_chance else "within chance"
        return f"{first} above {second}: mAP {gain:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {verdict}"
