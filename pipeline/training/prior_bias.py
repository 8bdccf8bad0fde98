"""The last layer's biases before the first step: how often each class is to be heard."""

import numpy as np
import torch
from torch import nn

import student
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.logits.alignment import AlignedLogits

CLIPS_AT_ONCE = 4096
"""The logits of so many clips are held in memory; with 527 classes some 50 MB."""


@torch.no_grad()
def set_prior_bias(model: nn.Module, shares: np.ndarray) -> None:
    """Set the last layer's biases so that an untrained model gives each class its share.

    Args:
        model: has timm's `get_classifier`.
        shares: (classes,), above 0 and below 1.

    Raises:
        UsageError: the model's last layer has no bias for each class.
    """
    classifier: nn.Module = model.get_classifier()  # pyright: ignore[reportCallIssue]
    biases = [bias for name, bias in classifier.named_parameters() if name.endswith("bias")]
    fitting = [bias for bias in biases if bias.shape == shares.shape]
    if not fitting:
        raise UsageError("--prior-bias: this model's last layer has no bias for each class; leave it out")
    fitting[-1].copy_(torch.logit(torch.from_numpy(shares)))


def label_shares(manifest: Manifest) -> np.ndarray:
    """Returns the share of each class among the clips of which it is known whether they have it: (classes,).

    A class that no clip has counts as half a clip, for it may come up elsewhere.
    """
    return (manifest.label_counts() + 0.5) / (manifest.known_counts() + 1)


def target_shares(manifest: Manifest, logits: AlignedLogits, distill: student.DistillConfig) -> np.ndarray:
    """Returns the mean of what a student is to say of each class: labels, teachers, or both, as its loss has them.

    Args:
        manifest: the clips to learn from.
        logits: of the teachers, in the manifest's order.
        distill: how labels and teachers share the loss.

    Returns:
        (classes,), above 0 and below 1: half a clip is added to each class, as to the labels'.
    """
    targets, weights = np.full(len(manifest.vocabulary), 0.5), np.ones(len(manifest.vocabulary))
    for start in range(0, len(manifest), CLIPS_AT_ONCE):
        rows = np.arange(start, min(start + CLIPS_AT_ONCE, len(manifest)))
        stored = torch.from_numpy(logits.take(rows))  # (some, classes), or (some, views, classes)
        probabilities = student.teacher_probabilities(stored, distill).view(len(rows), -1, len(targets)).mean(dim=1)
        mask = manifest.label_mask(rows)
        weighted, weight = student.weighted_targets(
            torch.from_numpy(manifest.label_matrix(rows)),
            probabilities,  # (some, classes)
            torch.from_numpy(logits.has_logits[rows]),
            distill,
            None if mask is None else torch.from_numpy(mask),
        )
        targets += weighted.sum(dim=0, dtype=torch.float64).numpy()
        weights += weight.sum(dim=0, dtype=torch.float64).numpy()
    return targets / weights
