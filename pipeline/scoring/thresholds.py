"""A threshold for each class: those that maximise F1 on labelled clips, and the file that keeps them."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dataset.text_lists import TableError, read_table
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import PipelineError
from pipeline.storage import files as storage

_COLUMNS = ("index", "mid", "display_name", "threshold", "f1", "positives")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassThresholds:
    """What has to be reached for a class to count as heard."""

    thresholds: np.ndarray
    """(classes,), probabilities 0 to 1; NaN where there is none."""
    f1: np.ndarray
    """(classes,), 0 to 1, at that threshold; NaN likewise."""
    positives: np.ndarray
    """(classes,), int64: clips that carry the class."""


def best_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None
) -> ClassThresholds:
    """Returns the thresholds that maximise each class's F1; of several the highest.

    A threshold lies in the middle between the lowest probability that counts and the next one below it.

    Args:
        probabilities: (clips, classes), 0 to 1.
        labels: (clips, classes), bool.
        label_mask: (clips, classes), bool: where the label is known; None is everywhere.
    """
    classes = labels.shape[1]
    thresholds, f1 = np.full(classes, np.nan), np.full(classes, np.nan)
    known = np.ones_like(labels, bool) if label_mask is None else label_mask
    positives = (labels & known).sum(axis=0)
    for index in np.flatnonzero(positives):
        rows = known[:, index]
        thresholds[index], f1[index] = _best_of_class(probabilities[rows, index], labels[rows, index])
    return ClassThresholds(thresholds=thresholds, f1=f1, positives=positives)


def _best_of_class(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    order = np.argsort(-probabilities, kind="stable")
    sorted_, hits = probabilities[order].astype(np.float64), labels[order].cumsum()
    below = np.append(sorted_[1:], -np.inf)
    f1 = np.where(sorted_ > below, 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1]), -1.0)  # equals stay together
    best = int(f1.argmax())
    return (sorted_[best] + max(below[best], 0.0)) / 2, max(float(f1[best]), 0.0)


def write_thresholds(location: str | Path, found: ClassThresholds, vocabulary: Vocabulary) -> None:
    """Publish thresholds as CSV: `index,mid,display_name,threshold,f1,positives`; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for label in vocabulary.classes:
        numbers = [f"{values[label.index]:.6g}" for values in (found.thresholds, found.f1)]
        known = [number.replace("nan", "") for number in numbers]
        writer.writerow([label.index, label.mid, label.name, *known, found.positives[label.index]])
    storage.publish_bytes(location, text.getvalue().encode())


def read_thresholds(location: str | Path, vocabulary: Vocabulary) -> np.ndarray:
    """Returns (classes,) thresholds, NaN for classes that the file has none for.

    Args:
        location: a CSV with the columns `mid` and `threshold`, and any others.
        vocabulary: the classes.

    Raises:
        PipelineError: it is no such file, names a class that is not there or twice, or a threshold is not 0 to 1.
    """
    thresholds = np.full(len(vocabulary), np.nan)
    rows = read_table(io.BytesIO(storage.read_bytes(location)), {"mid", "threshold"}, skip_spaces=False)
    try:
        _, head = next(rows, (1, []))
        if missing := {"mid", "threshold"} - set(head):
            raise PipelineError(f"{location}: has no column {' and no '.join(sorted(missing))}; thresholds are a CSV")
        for line, row in rows:
            mid, text = row[head.index("mid")], row[head.index("threshold")]
            index = vocabulary.index_by_mid.get(mid)
            if index is None:
                raise PipelineError(f"{location}:{line}: the model has no class {mid!r}")
            if text.strip():
                thresholds[index] = _probability(text, f"{location}:{line}")
    except (TableError, IndexError) as error:
        raise PipelineError(f"{location}: is not a CSV file of thresholds ({error})") from error
    return thresholds


def _probability(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise PipelineError(f"{where}: the threshold is {text!r}; a probability is 0 to 1")
    return value
