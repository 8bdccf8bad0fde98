"""A linear classifier on embeddings, cross-validated: what an embedding is worth on somebody's classes."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

import student
from pipeline.errors import PipelineError, UsageError

ProbeTask = Literal["single-label", "multi-label"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledEmbeddings:
    """Clips with embeddings and labels."""

    clip_ids: list[str]
    values: np.ndarray
    """(clips, size)."""
    labels: np.ndarray
    """(clips, classes), 0 or 1."""
    label_mask: np.ndarray | None
    """(clips, classes), bool: where the label is known; None where all are."""
    folds: np.ndarray
    """(clips,): which fold a clip is of, from 0."""

    @property
    def task(self) -> ProbeTask:
        """single-label where every clip has exactly one class, and all are known."""
        return "single-label" if self.label_mask is None and (self.labels.sum(axis=1) == 1).all() else "multi-label"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldScore:
    """How a probe did on a fold that it was not trained on."""

    fold: int
    clips: int
    classes: int
    """Classes that are scored: of those, clips of the fold have some."""
    score: float
    """Accuracy, or mAP, 0 to 1."""
    chance: float
    """The same score of a guess that knows how often each class is among the clips of training."""


def check_packages() -> None:
    """Refuse to begin where the extra is not installed.

    Raises:
        UsageError: it names what to install.
    """
    if find_spec("sklearn") is None:
        raise UsageError("probe needs scikit-learn: pip install 'audioset-distill[probe]'")


def fold_by_hash(clip_id: str, folds: int) -> int:
    """Returns a clip's fold, 0 to `folds` - 1; its id decides, in any dataset."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8, person=b"probe fold").digest()) % folds


def cross_validate(data: LabelledEmbeddings, *, c: float, task: ProbeTask) -> Iterator[FoldScore]:
    """Yields the score of each fold, of a classifier that was trained on the others.

    Args:
        data: clips of two folds or more.
        c: scikit-learn's inverse strength of regularisation.
        task: a softmax over the classes and accuracy, or a sigmoid each and mAP.

    Raises:
        PipelineError: there is nothing to train on or to score in a fold.
    """
    for fold in np.unique(data.folds).tolist():
        test = data.folds == fold
        if not (~test).any():
            raise PipelineError("all clips are of one fold; choose more --folds, or add clips")
        fit = _single if task == "single-label" else _multi
        predicted = fit(data, ~test, test, c)  # (clips of the fold, classes)
        labels, prior = data.labels[test], data.labels[~test].mean(axis=0)
        if task == "single-label":
            truth, present = labels.argmax(axis=1), int(labels.any(axis=0).sum())
            score, chance = (predicted.argmax(axis=1) == truth).mean(), (prior.argmax() == truth).mean()
        else:
            mask = None if data.label_mask is None else data.label_mask[test]
            found = student.tagging_scores(predicted, labels, label_mask=mask)
            guess = student.tagging_scores(
                np.broadcast_to(prior, labels.shape).astype(np.float32), labels, label_mask=mask
            )
            score, chance = found.mean_average_precision, guess.mean_average_precision
            present = found.scored_classes
        yield FoldScore(fold=fold, clips=int(test.sum()), classes=present, score=float(score), chance=float(chance))


def _single(data: LabelledEmbeddings, train: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    target = data.labels[train].argmax(axis=1)
    scores = np.full((int(test.sum()), data.labels.shape[1]), -np.inf, np.float32)
    if len(np.unique(target)) < 2:
        raise PipelineError("the clips to train on are all of one class; a probe needs two or more")
    model = _classifier(c).fit(_numbers(data.values[train]), target)
    scores[:, model.classes_] = model.predict_log_proba(_numbers(data.values[test]))
    return scores


def _multi(data: LabelledEmbeddings, train: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    values, heard = _numbers(data.values), np.zeros((int(test.sum()), data.labels.shape[1]), np.float32)
    known = np.ones(data.labels.shape, bool) if data.label_mask is None else data.label_mask
    for number in range(data.labels.shape[1]):
        rows = train & known[:, number]
        target = data.labels[rows, number]
        if 0 < target.sum() < len(target):  # of a class that is nowhere, or everywhere, nothing can be learnt
            heard[:, number] = _classifier(c).fit(values[rows], target).decision_function(values[test])
    return heard


def _numbers(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _classifier(c: float):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
