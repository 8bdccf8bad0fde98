"""How much a mAP depends on which clips there happened to be: it is measured again on clips drawn from the same ones.

A replicate draws as many clips as there are, with replacement (Efron 1979). Drawing a clip several times is the same as
counting it so often, so each class is sorted once, and a replicate is a weighted average precision: sums of weights
between one positive clip and the next.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

_WEIGHTS_AT_ONCE = 1 << 19
"""Weights that are summed at a time: a table that stays in a processor's cache."""
_RANKS_AT_ONCE = 1 << 24
"""Ranks that are kept at a time."""


def bootstrap_mean_average_precision(
    scores: NDArray,
    targets: NDArray,
    rows: NDArray | None = None,
    *,
    label_mask: NDArray | None = None,
    replicates: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda classes: None,
) -> Floats:
    """Returns the mAP of each replicate, (replicates,); NaN where none of its clips has a class.

    A class that none of a replicate's clips has is left out of its mean. The seed and a replicate's number alone decide
    which clips it draws, so that systems scored on the same clips have the same replicates, and their difference is
    paired.

    Args:
        scores: (clips, classes), finite; they may be memory-mapped.
        targets: (clips, classes), 0 or 1.
        rows: (scored clips,), the rows to score; all of them where it is left out.
        label_mask: (clips, classes), bool: whether a label is known; None where all are.
        replicates: how many, 0 or more.
        seed: decides the draws, 0 or more.
        advance: is told how many classes more are done.
    """
    rows = np.arange(len(scores)) if rows is None else rows
    total, scored = np.zeros(replicates), np.zeros(replicates)
    step = max(1, _RANKS_AT_ONCE // max(len(rows), 1))
    for first in range(0, scores.shape[1] if replicates else 0, step):
        block = slice(first, first + step)
        known = None if label_mask is None else label_mask[:, block][rows]
        ranked = _rank(np.asarray(scores[:, block][rows]), targets[:, block][rows].astype(bool), known)
        some = max(1, _WEIGHTS_AT_ONCE // max(len(rows), 1))
        for start in range(0, replicates, some) if ranked else ():
            numbers = range(start, min(start + some, replicates))
            weights = _draw(len(rows), numbers, seed)  # (clips, replicates)
            precision = torch.stack([one.average_precision(weights) for one in ranked])  # (classes, replicates)
            total[start : numbers.stop] += precision.nansum(dim=0).numpy()
            scored[start : numbers.stop] += (~precision.isnan()).sum(dim=0).numpy()
        advance(min(step, scores.shape[1] - first))
    return np.divide(total, scored, out=np.full(replicates, np.nan), where=scored > 0)


def _draw(clips: int, numbers: range, seed: int) -> Tensor:
    """Returns how often each of the replicates draws each clip, (clips, replicates) float32."""
    counts = [
        np.bincount(np.random.default_rng([seed, number]).integers(clips, size=clips), minlength=clips)
        for number in numbers
    ]
    return torch.from_numpy(np.stack(counts, axis=1).astype(np.float32))


class _RankedClass:
    """Where one class's positive clips stand among all clips, the highest score first.

    Args:
        scores: (clips,) of those whose label is known.
        targets: (clips,), bool, with at least one positive.
        clips: (clips,), their rows in the table of weights.
    """

    def __init__(self, scores: NDArray, targets: NDArray, clips: NDArray) -> None:
        order = np.argsort(-scores)  # (clips,)
        falling = -scores[order]
        positives = order[targets[order]]  # (positives,)
        hits = -scores[positives]  # (positives,), rising
        reach = np.searchsorted(falling, hits, "right")  # (positives,): clips as high as each, or higher
        self._clips = _indices(clips[order[: reach[-1]]])
        self._starts = _indices(np.concatenate(([0], reach[:-1])))
        self._positives = _indices(clips[positives])
        self._last_equal = _indices(np.searchsorted(hits, hits, "right") - 1)  # (positives,)

    def average_precision(self, weights: Tensor) -> Tensor:
        """Returns the average precision under each column of weights, (clips, replicates): (replicates,)."""
        gained = weights[self._positives].double()  # (positives, replicates)
        # Of positives that tie, the first one's bag holds all clips in between, and the others' are empty.
        above = F.embedding_bag(self._clips, weights, self._starts, mode="sum").cumsum(dim=0)  # (positives, replicates)
        hits = gained.cumsum(dim=0)
        precision = gained * hits[self._last_equal] / above.clamp(min=1)  # nothing gained where nothing is above
        return precision.sum(dim=0) / hits[-1]  # 0 / 0 is NaN: a replicate without positives


def _rank(scores: NDArray, targets: NDArray, known: NDArray | None) -> list[_RankedClass]:
    """Rank the classes that have positives: scores, targets and known are (clips, classes)."""
    if scores.dtype == np.float16:
        scores = scores.astype(np.float32)
    ranked = []
    for number in range(scores.shape[1]):
        clips = np.arange(len(scores)) if known is None else np.flatnonzero(known[:, number])
        wanted = targets[clips, number]
        if wanted.any():
            ranked.append(_RankedClass(scores[clips, number], wanted, clips))
    return ranked


def _indices(numbers: NDArray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32))
