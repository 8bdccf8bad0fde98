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

_BLOCK = 1 << 24
"""Scores that are worked on at a time."""


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


def tagging_scores(
    scores: NDArray, targets: NDArray, rows: NDArray | None = None, *, label_mask: NDArray | None = None
) -> TaggingScores:
    """Score predictions against labels, a few classes at a time: beyond its arguments it needs little memory.

    Args:
        scores: (clips, classes); logits and probabilities give the same result but where rounding makes ties. It may
            be memory-mapped.
        targets: (clips, classes), 0 or 1.
        rows: (scored clips,), the rows to score; all of them where it is left out.
        label_mask: (clips, classes), bool: a class is scored on the clips where this is True, as OpenMIC needs it, most
            of whose labels are unknown; on all clips where it is left out.

    Raises:
        ValueError: the shapes disagree, a score isn't finite, or a target is neither 0 nor 1.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} aren't one (clips, classes)")
    if label_mask is not None and label_mask.shape != scores.shape:
        raise ValueError(f"label_mask {label_mask.shape} isn't of the shape of the scores, {scores.shape}")
    chosen = slice(None) if rows is None else rows
    clips = len(scores) if rows is None else len(rows)
    ranked: list[_Ranked] = []
    not_finite = np.zeros(clips, dtype=bool)
    step = max(1, _BLOCK // max(clips, 1))
    for first in range(0, scores.shape[1], step):
        block = slice(first, first + step)
        columns = np.ascontiguousarray(scores[:, block][chosen].T)  # (some classes, clips)
        wanted = np.ascontiguousarray(targets[:, block][chosen].T)  # (some classes, clips)
        not_finite |= ~np.isfinite(columns).all(axis=0)
        if not ((wanted == 0) | (wanted == 1)).all():
            raise ValueError("a target is neither 0 nor 1; mixed or soft labels can't be scored")
        if label_mask is None:
            ranked += [_rank(*column) for column in zip(columns, wanted.astype(bool), strict=True)]
            continue
        known = label_mask[:, block][chosen].T  # (some classes, clips)
        pairs = zip(columns, wanted.astype(bool), known, strict=True)
        ranked += [_rank(score[kept], target[kept]) for score, target, kept in pairs]
    if not_finite.any():
        raise ValueError(f"{int(not_finite.sum())} clips have scores that aren't finite")
    return TaggingScores(
        average_precision=np.array([one.average_precision for one in ranked]),
        roc_auc=np.array([one.roc_auc for one in ranked]),
        positives=np.array([one.positives for one in ranked], dtype=np.int64),
        clips=clips,
    )


def accuracy(scores: NDArray, targets: NDArray) -> float:
    """Returns the share of the clips whose highest score is that of their one class.

    Of equal scores the class that comes first counts, as with scikit-learn's `accuracy_score` of the argmax.

    Args:
        scores: (clips, classes).
        targets: (clips, classes), 0 or 1, one class a clip.

    Returns:
        0 to 1.

    Raises:
        ValueError: the shapes disagree, or a clip has no class or several.
    """
    return float(_hits(scores, targets).mean())


def class_accuracy(scores: NDArray, targets: NDArray) -> float:
    """Average over the classes the share of a class's clips that are recognised, as DCASE's task 1 does.

    Arguments and errors are those of `accuracy`. Classes without clips are left out.
    """
    hits, classes = _hits(scores, targets), targets.argmax(axis=1)
    counts = np.bincount(classes)
    return _mean(np.bincount(classes, weights=hits)[counts > 0] / counts[counts > 0])


def _hits(scores: NDArray, targets: NDArray) -> NDArray[np.bool_]:
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} aren't one (clips, classes)")
    if len(several := np.flatnonzero((targets > 0).sum(axis=1) != 1)):
        raise ValueError(f"{len(several)} clips have no class or several; accuracy is of clips with one each")
    return scores.argmax(axis=1) == targets.argmax(axis=1)


def average_precision(scores: NDArray, targets: NDArray) -> float:
    """Average the precision over the recall of one class: sum of (recall gained) x precision at each threshold.

    Args:
        scores: (clips,).
        targets: (clips,), bool.

    Returns:
        0 to 1; NaN without a positive clip.
    """
    return _rank(scores, targets).average_precision


def roc_auc(scores: NDArray, targets: NDArray) -> float:
    """Measure the area under one class's ROC curve: the chance that a positive clip outranks a negative one.

    Args:
        scores: (clips,).
        targets: (clips,), bool.

    Returns:
        0 to 1, a tie counting half; NaN without a positive or without a negative clip.
    """
    return _rank(scores, targets).roc_auc


def d_prime(area: Floats | np.float64) -> Floats:
    """Turn areas under the ROC curve into d′: how many standard deviations apart two normal classes would lie."""
    return np.sqrt(2.0) * torch.special.ndtri(torch.as_tensor(area, dtype=torch.float64)).numpy()


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Where one class's positive clips stand among all clips."""

    positives: int
    average_precision: float
    roc_auc: float


def _rank(scores: NDArray, targets: NDArray) -> _Ranked:
    """Score one class: `scores` (clips,), `targets` (clips,) bool.

    Only positive clips gain recall, and an area is a sum over positive clips, so all that is needed is how many clips
    are above, and how many beside, each of them. Sorting values alone is several times faster than sorting clips.
    """
    nan = float("nan")
    clips = np.sort(scores.astype(np.float32) if scores.dtype == np.float16 else scores)
    hits = np.sort(scores[targets]).astype(clips.dtype)  # (positives,)
    if not len(hits):
        return _Ranked(0, nan, nan)
    below, up_to = np.searchsorted(clips, hits, "left"), np.searchsorted(clips, hits, "right")
    hits_below, hits_up_to = np.searchsorted(hits, hits, "left"), np.searchsorted(hits, hits, "right")
    precision = float(((len(hits) - hits_below) / (len(clips) - below)).mean())  # at the threshold of each positive
    negatives = len(clips) - len(hits)
    if not negatives:
        return _Ranked(len(hits), precision, nan)
    outranked = (below - hits_below) + (up_to - hits_up_to)  # (positives,): twice, a tie counting half
    return _Ranked(len(hits), precision, float(outranked.sum() / (2 * len(hits) * negatives)))


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
