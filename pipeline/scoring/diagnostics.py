"""Where a system goes wrong: precision against recall class by class, calibration, the clips with the largest loss."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.scoring.scoring import System, probabilities_of
from pipeline.scoring.tagging_metrics import ranking_scores

CALIBRATION_BINS = 10
_ROWS_AT_ONCE = 1 << 14
_CLASSES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """Probabilities against what came true, over every clip and class whose label is known."""

    counts: np.ndarray
    """(bins,), int64: how many probabilities fall into each of the equally wide bins."""
    predicted: np.ndarray
    """(bins,), their mean, 0 to 1; NaN in an empty bin."""
    observed: np.ndarray
    """(bins,), the share of them whose clip carries the class; NaN likewise."""

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1: |predicted - observed|, weighed by the counts (arXiv:1706.04599)."""
        filled = self.counts > 0
        gaps = np.abs(self.predicted - self.observed)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum()) if filled.any() else float("nan")


def calibrate(system: System, manifest: Manifest, rows: np.ndarray) -> Calibration:
    """Returns how far a system's probabilities can be taken at their word.

    Args:
        system: of the manifest's clips.
        manifest: the dataset.
        rows: (clips,), those that count.
    """
    counts, predicted, observed = (np.zeros(CALIBRATION_BINS) for _ in range(3))
    for some in _blocks(rows, _ROWS_AT_ONCE):
        probabilities = probabilities_of(system, some)
        labels, mask = manifest.label_matrix(some, dtype=bool), manifest.label_mask(some)
        known = np.ones_like(labels) if mask is None else mask
        chosen, true = probabilities[known].astype(np.float64), labels[known]
        bins = np.minimum((chosen * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        for total, weights in ((counts, None), (predicted, chosen), (observed, true)):
            total += np.bincount(bins, weights, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        return Calibration(counts=counts.astype(np.int64), predicted=predicted / counts, observed=observed / counts)


def precision_recall_curves(
    system: System, manifest: Manifest, rows: np.ndarray, *, max_points: int
) -> Iterator[np.ndarray]:
    """Yields for each class (points, 2) recall and precision, 0 to 1, recall ascending; no points without a positive.

    A point is a threshold that lets one more positive clip in; the area below the steps that end at these points is
    the average precision.

    Args:
        system: of the manifest's clips.
        manifest: the dataset.
        rows: (clips,), those that count.
        max_points: of more, evenly many are kept, the first and the last among them.
    """
    labels, mask = manifest.label_matrix(rows, dtype=bool), manifest.label_mask(rows)
    everything = ranking_scores(system.logits, system.task) if system.task == "single-label" else system.logits
    for some in _blocks(np.arange(labels.shape[1]), _CLASSES_AT_ONCE):
        scores = np.asarray(everything[:, some[0] : some[-1] + 1][rows], np.float32)  # (clips, some classes)
        for index, column in zip(some, scores.T, strict=True):
            known = slice(None) if mask is None else mask[:, index]
            yield _curve(column[known], labels[known, index], max_points)


def _curve(scores: np.ndarray, positives: np.ndarray, max_points: int) -> np.ndarray:
    clips, hits = np.sort(scores), np.sort(scores[positives])
    thresholds = np.unique(hits)[::-1]
    above = len(clips) - np.searchsorted(clips, thresholds, "left")
    hits_above = len(hits) - np.searchsorted(hits, thresholds, "left")
    kept = np.unique(np.linspace(0, len(thresholds) - 1, min(max_points, len(thresholds))).round().astype(np.int64))
    return np.stack([hits_above[kept] / max(len(hits), 1), hits_above[kept] / above[kept]], axis=1)


def clip_losses(system: System, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Returns each clip's cross entropy against its labels, (clips,) float64, in nats; NaN where none is known.

    It is the mean over the classes whose label is known, each with a sigmoid, or of one softmax over all classes.

    Args:
        system: of the manifest's clips.
        manifest: the dataset.
        rows: (clips,), which clips.
    """
    losses = [
        _losses(system, some, manifest.label_matrix(some, dtype=bool), manifest.label_mask(some))
        for some in _blocks(rows, _ROWS_AT_ONCE)
    ]
    return np.concatenate([np.empty(0), *losses])


def _losses(system: System, rows: np.ndarray, labels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    logits = np.asarray(system.logits[rows], np.float64)
    if system.task == "single-label":
        terms = -ranking_scores(logits, system.task) * labels
        known, count = labels, labels.sum(axis=1)
    else:
        terms = np.logaddexp(0.0, np.where(labels, -logits, logits))
        known = np.ones_like(labels) if mask is None else mask
        count = known.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (terms * known).sum(axis=1) / np.where(count, count, np.nan)


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
