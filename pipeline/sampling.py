"""(clips, seed, epoch) → which clips a training run sees, in which order, in which batches.

Nothing here is drawn from hidden state. The clips of any step can be computed from the step's number alone, so a run
resumes in the middle of an epoch, on any number of loader workers, as if it had never stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pipeline.errors import UsageError
from pipeline.manifest import Manifest

Sampling = Literal["balanced", "uniform"]


def sampling_weights(manifest: Manifest) -> np.ndarray:
    """Give rare classes a better chance: a clip weighs the sum over its classes of 1000 / (100 + count of the class).

    Returns:
        (clips,), float64. A clip without labels weighs nothing and is never drawn.

    The weights of PaSST's and EfficientAT's balanced sampler (Koutini et al. 2022, arXiv:2110.05069, section 4).
    """
    class_weights = 1000.0 / (100.0 + manifest.label_counts())  # (classes,)
    indptr, classes = manifest.labels_csr
    row_of_label = np.repeat(np.arange(len(manifest)), np.diff(indptr))  # (labels of all clips,)
    return np.bincount(row_of_label, weights=class_weights[classes], minlength=len(manifest))


def seed_for(*path: int) -> int:
    """Give the seed, 0 to 2^63 - 1, of what `path` names, such as (run's seed, step): unrelated for unequal paths."""
    # NumPy promises that SeedSequence gives the same words in all its versions.
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(weights: np.ndarray, clips: int, *, seed: int, epoch: int) -> np.ndarray:
    """Draw clips without replacement, each next one with a probability proportional to its weight among those left.

    Every clip runs a race that takes it an exponential time at its weight's rate; the first `clips` to arrive are the
    sample, in that order. This is exactly sequential weighted sampling (Efraimidis and Spirakis 2006,
    doi:10.1016/j.ipl.2005.11.003), in one vectorised pass over millions of clips.

    Args:
        weights: (clips of the dataset,), 0 or more; a clip of weight 0 is never drawn.
        clips: how many to draw; at most the number of positive weights.
        seed: the run's.
        epoch: from 0.

    Returns:
        (clips,), int64 rows, in the order of the draws.

    Raises:
        ValueError: fewer than `clips` weights are positive.
    """
    rows = np.flatnonzero(weights > 0)
    if clips > len(rows):
        raise ValueError(f"{clips} clips can't be drawn without replacement from {len(rows)} of positive weight")
    # Raw bits, because NumPy may change how it draws exponentials, but not the bits of Philox.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(len(weights))[rows]
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # strictly between 0 and 1
    arrivals = -np.log(uniform) / weights[rows]
    first = np.argpartition(arrivals, clips - 1)[:clips] if clips < len(rows) else np.arange(clips)
    return rows[first[np.argsort(arrivals[first], kind="stable")]]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which clips every step of a run trains on. Steps count from 0 over all epochs; every batch is full."""

    weights: np.ndarray
    """(clips of the dataset,): how likely each clip is; equal weights are a plain shuffle."""
    batch_size: int
    """Clips a step, over all processes together."""
    clips_per_epoch: int | None = None
    """Clips drawn for one epoch; None draws every clip of positive weight once. Rounded down to whole batches."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size > self._drawn:
            raise UsageError(
                f"batch_size is {self.batch_size}, but an epoch draws only {self._drawn} clips; "
                "choose a smaller --batch-size (or check that the clips have labels: balanced sampling passes over "
                "those without; --sampling uniform takes all)"
            )

    @cached_property
    def _drawn(self) -> int:
        drawable = int(np.count_nonzero(self.weights > 0))
        return drawable if self.clips_per_epoch is None else min(self.clips_per_epoch, drawable)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self._drawn // self.batch_size

    def epoch_of(self, step: int) -> int:
        """Give the epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def batch_at(self, step: int) -> np.ndarray:
        """Give the rows, (batch,) int64, of one step."""
        return next(self.batches(step))

    def batches(self, first_step: int = 0, end_step: int | None = None) -> Iterator[np.ndarray]:
        """Go through the steps' rows from `first_step` up to but without `end_step` (None: for ever)."""
        step = first_step
        while end_step is None or step < end_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.weights, self._drawn, seed=self.seed, epoch=epoch)
            for batch in range(within, self.steps_per_epoch):
                if step == end_step:
                    return
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
                step += 1
