"""How a model in training is judged; both training commands use it."""

import numpy as np

import student


def judge(logits: np.ndarray, labels: np.ndarray, judged: np.ndarray | None = None) -> dict[str, float]:
    """Give the figures of one evaluation.

    Args:
        logits: (clips, classes).
        labels: (clips, classes), 0 or 1.
        judged: (clips, classes) bool; what is False is left out. None scores all.

    Returns:
        `mAP` and `roc_auc`, 0 to 1, `d_prime`, and `classes`: how many have a positive clip and so enter the means.
    """
    scores = student.tagging_scores(logits, labels, judged=judged)
    return {
        "mAP": scores.mean_average_precision,
        "roc_auc": scores.mean_roc_auc,
        "d_prime": scores.mean_d_prime,
        "classes": float(scores.scored_classes),
    }
