"""Whether logits that came from elsewhere belong to the clips that they are said to belong to.

The test is one of permutation. If rows were shuffled, a clip's logits would say no more about its own labels than about
any other clip's; so the mAP on the clips' own labels would be one draw out of the mAPs with the labels dealt out anew.
It has to stand above these by `_DEVIATIONS` of their standard deviations, in every stretch of the rows: a file whose
second half is shifted fits well as a whole. And no neighbouring row's labels may fit better, which is how rows that are
one off look where clips are sorted by class.
"""

from dataclasses import dataclass

import numpy as np

from student import tagging_scores

MAX_CLIPS = 8_000
"""Clips in a sample, over all stretches."""

_STRETCHES = 8
_LEAST_OF_STRETCH = 500
_DEALS = 16
"""How often labels are dealt out anew."""
_DEVIATIONS = 5.0
_OFFSETS = (-2, -1, 1, 2)
_LEAST_NEIGHBOURS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFit:
    """How well the logits of one stretch of rows fit."""

    clips: int
    first_row: int
    last_row: int
    mean_average_precision: float
    """On the clips' own labels, 0 to 1."""
    dealt_mean: float
    """The mean mAP with the same labels dealt out at random: chance."""
    dealt_deviation: float
    offset: int | None
    """How many rows further the clips are whose labels fit better than their own; None where none do."""

    @property
    def fits(self) -> bool:
        """Whether the logits are their clips'."""
        above_chance = self.mean_average_precision - self.dealt_mean > _DEVIATIONS * self.dealt_deviation
        return above_chance and self.offset is None


def stretches(rows: np.ndarray) -> list[np.ndarray]:
    """Cut a sample of rows, ascending, where it is large enough to be judged piece by piece."""
    return np.array_split(rows, min(_STRETCHES, max(1, len(rows) // _LEAST_OF_STRETCH)))


def measure_fit(
    logits: np.ndarray, rows: np.ndarray, labels: np.ndarray, neighbours: dict[int, tuple[np.ndarray, np.ndarray]]
) -> LabelFit:
    """Returns how well the logits of one stretch fit.

    Args:
        logits: (clips, classes), finite.
        rows: (clips,), where they lie in the files.
        labels: (clips, classes), 0 or 1, of the clips that the rows are said to be.
        neighbours: from `offsets`: for each offset the clips, (some,), whose neighbour that far away is known, and the
            neighbours' labels, (some, classes).
    """
    own = _mean_average_precision(logits, labels)
    random = np.random.default_rng(0)
    dealt = [_mean_average_precision(logits, labels[random.permutation(len(labels))]) for _ in range(_DEALS)]
    deviation = float(np.std(dealt, ddof=1))
    better: dict[int, float] = {}
    for offset, (clips, their_labels) in neighbours.items():
        if len(clips) >= min(_LEAST_NEIGHBOURS, len(rows) // 2):
            gain = _mean_average_precision(logits[clips], their_labels) - _mean_average_precision(
                logits[clips], labels[clips]
            )
            if gain > _DEVIATIONS * deviation:
                better[offset] = gain
    return LabelFit(
        clips=len(rows),
        first_row=int(rows[0]),
        last_row=int(rows[-1]),
        mean_average_precision=own,
        dealt_mean=float(np.mean(dealt)),
        dealt_deviation=deviation,
        offset=max(better, key=better.__getitem__, default=None),
    )


def offsets(rows: np.ndarray, clip_of_row: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the sampled rows with a known neighbour: offset → their places in `rows`, and the neighbours' clips.

    Args:
        rows: (sample,), of the files.
        clip_of_row: (rows,), -1 where a row's clip is not known.
    """
    found = {}
    for offset in _OFFSETS:
        inside = np.flatnonzero((rows + offset >= 0) & (rows + offset < len(clip_of_row)))
        clips = clip_of_row[rows[inside] + offset]
        found[offset] = inside[clips >= 0], clips[clips >= 0]
    return found


def _mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    return tagging_scores(logits, labels).mean_average_precision
