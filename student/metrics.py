"""How well clips are tagged: average precision, area under the ROC curve and d′, class by class.

The definitions are scikit-learn's (`average_precision_score`, `roc_auc_score`), ties included: equal scores are one
threshold. A class without a positive clip (or, for the ROC, without a negative one) has no value, written as NaN.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TaggingScores:
    """The scores of each class, NaN where they have no meaning, and their means over the classes that have them."""

    average_precision: Floats
    """(classes,), 0 to 1."""

    roc_auc: Floats
    """(classes,), 0 to 1; 0.5 is chance."""

    positives: NDArray[np.int64]
    """(classes,): clips that carry the class."""

    clips: int
    """Number of clips that were scored."""

    @cached_property
    def scored_classes(self) -> int:
        """Classes with at least one positive clip: those that the mAP is the mean of."""
        return int((self.positives > 0).sum())

    @cached_property
    def mean_average_precision(self) -> float:
        """The mAP, 0 to 1; NaN if no class has a positive clip."""
        return _mean(self.average_precision)

    @cached_property
    def mean_roc_auc(self) -> float:
        """The mean area under the ROC curve, 0 to 1."""
        return _mean(self.roc_auc)

    @cached_property
    def mean_d_prime(self) -> float:
        """The d′ that belongs to the mean area, as AudioSet's papers report it."""
        return float(d_prime(np.float64(self.mean_roc_auc)))


def tagging_scores(scores: NDArray, targets: NDArray) -> TaggingScores:
    """Score predictions against labels.

    Args:
        scores: (clips, classes); logits and probabilities give the same result but where rounding makes ties.
        targets: (clips, classes), 0 or 1.

    Raises:
        ValueError: the shapes disagree, a score isn't finite, or a target is neither 0 nor 1.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} aren't one (clips, classes)")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} clips have scores that aren't finite")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("a target is neither 0 nor 1; mixed or soft labels can't be scored")
    columns = list(zip(scores.T, targets.T.astype(bool), strict=True))
    return TaggingScores(
        average_precision=np.array([average_precision(*column) for column in columns]),
        roc_auc=np.array([roc_auc(*column) for column in columns]),
        positives=targets.sum(axis=0).astype(np.int64),
        clips=len(scores),
    )


def average_precision(scores: NDArray, targets: NDArray) -> float:
    """Average the precision over the recall of one class: sum of (recall gained) x precision at each threshold.

    Args:
        scores: (clips,).
        targets: (clips,), bool.

    Returns:
        0 to 1; NaN without a positive clip.
    """
    hits, alarms = _hits_and_alarms(scores, targets)
    if not len(hits) or hits[-1] == 0:
        return float("nan")
    return float(np.sum(np.diff(hits, prepend=0) * hits / (hits + alarms)) / hits[-1])


def roc_auc(scores: NDArray, targets: NDArray) -> float:
    """Measure the area under one class's ROC curve: the chance that a positive clip outranks a negative one.

    Args:
        scores: (clips,).
        targets: (clips,), bool.

    Returns:
        0 to 1, a tie counting half; NaN without a positive or without a negative clip.
    """
    hits, alarms = _hits_and_alarms(scores, targets)
    if not len(hits) or hits[-1] == 0 or alarms[-1] == 0:
        return float("nan")
    mean_hits = hits - np.diff(hits, prepend=0) / 2  # between one threshold and the next the curve is straight
    return float(np.sum(np.diff(alarms, prepend=0) * mean_hits) / (hits[-1] * alarms[-1]))


def d_prime(area: Floats | np.float64) -> Floats:
    """Turn areas under the ROC curve into d′: how many standard deviations apart two normal classes would lie."""
    return np.sqrt(2.0) * torch.special.ndtri(torch.as_tensor(area, dtype=torch.float64)).numpy()


def _hits_and_alarms(scores: NDArray, targets: NDArray) -> tuple[Floats, Floats]:
    """Count the positive and negative clips at or above each distinct score, from the highest: two (thresholds,)."""
    scores = scores.astype(np.float64, copy=False)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_tie = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.array([], int)
    hits = np.cumsum(targets[order], dtype=np.float64)[last_of_tie]
    return hits, last_of_tie + 1 - hits


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
