"""The metrics of every training command, and scores that can be compared between clips."""

import numpy as np
import torch

import student
from pipeline.models.weights import Task


def ranking_scores(logits: np.ndarray, task: Task) -> np.ndarray:
    """Returns (clips, classes) scores that rank one clip against another.

    A logit does. But where classes compete in a softmax, only its (log) probabilities do: logits of a clip may all be
    shifted alike.
    """
    if task == "multi-label":
        return logits
    return torch.from_numpy(np.asarray(logits)).log_softmax(dim=1).numpy()


def tagging_metrics(logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
    """Returns the metrics of one evaluation.

    Args:
        logits: (clips, classes).
        labels: (clips, classes), 0 or 1.
        label_mask: (clips, classes) bool: where the label is known. None scores all.

    Returns:
        `mAP` and `roc_auc`, 0 to 1, `d_prime`, and `classes`: how many have a positive clip and so enter the means.
    """
    scores = student.tagging_scores(logits, labels, label_mask=label_mask)
    return {
        "mAP": scores.mean_average_precision,
        "roc_auc": scores.mean_roc_auc,
        "d_prime": scores.mean_d_prime,
        "classes": float(scores.scored_classes),
    }
