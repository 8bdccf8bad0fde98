"""A student's loss: against labels, and against the soft targets of its teachers."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from student.mixup import Mix


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """How the labels and the teacher share the loss."""

    teacher_weight: float = 0.9
    """Share of the loss taken from the teacher, 0 to 1; the labels get the rest (1 minus the paper's lambda).

    1 is pure distillation; even then a clip without teacher logits learns from its labels.
    """

    without_logits: Literal["full", "share"] = "full"
    """What the labels of a clip without teacher logits weigh. full: all of its loss, so that it counts as much as any
    other clip. share: 1 - teacher_weight of it, as EfficientAT does, where such a clip counts a tenth. The teacher's
    logits of a class whose label is unknown weigh likewise: all, or teacher_weight."""

    temperature: float = 1.0
    """Divides the teacher's logits before the sigmoid, above 0; more than 1 softens the targets."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"distill.teacher_weight is {self.teacher_weight}; choose a value from 0 to 1")
        if self.without_logits not in ("full", "share"):
            raise ValueError(f"distill.without_logits is {self.without_logits}; choose full or share")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature is {self.temperature}; choose a value above 0")


def teacher_probabilities(teacher_logits: Tensor, config: DistillConfig) -> Tensor:
    """Turn stored logits (batch, classes) into the probabilities that the student is to imitate, at least float32."""
    return (_float32_or_more(teacher_logits) / config.temperature).sigmoid()


def _float32_or_more(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def clip_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Score each clip by binary cross entropy, averaged over the classes.

    Args:
        logits: (batch, classes).
        targets: (batch, classes), 0 to 1.

    Returns:
        (batch,), in nats, at least float32.

    Raises:
        ValueError: the shapes disagree.
    """
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} aren't one (batch, classes)")
    logits = _float32_or_more(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none").mean(dim=1)


def masked_bce(logits: Tensor, positives: Tensor, label_mask: Tensor) -> Tensor:
    """Returns each clip's binary cross entropy over the classes whose label is known.

    For clips as they are this is the cross entropy of the known classes, the others counting nothing, averaged over
    all classes, as EfficientAT does for OpenMIC. Mixed clips have mixed `positives` and `label_mask`: the loss is then
    the mixed loss of the two, so that what is unknown in one of them is not taken for absent.

    Args:
        logits: (batch, classes).
        positives: (batch, classes), 0 to `label_mask`: how much of the clip is known to have the class.
        label_mask: (batch, classes), 0 to 1: of how much of the clip the label is known.

    Returns:
        (batch,), in nats, at least float32.
    """
    logits = _float32_or_more(logits)
    # Cross entropy is softplus(logit) - target x logit, and linear in the clip's shares.
    return (label_mask * F.softplus(logits) - positives * logits).mean(dim=1)


def known_labels(labels: Tensor, label_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the positives and the mask that `masked_bce` takes, of clips that are not mixed yet.

    Args:
        labels: (batch, classes), 0 to 1; any value where a label is unknown.
        label_mask: (batch, classes), bool: whether the label is known; None where all are.
    """
    mask = torch.ones_like(labels) if label_mask is None else label_mask.to(labels)
    return labels * mask, mask


def blend_targets(
    labels: Tensor,
    teacher_probs: Tensor,
    has_teacher: Tensor,
    config: DistillConfig,
    label_mask: Tensor | None = None,
) -> Tensor:
    """Returns each clip's target: its labels and its teacher's probabilities in one.

    Cross entropy is linear in its target, so the loss against this blend *is* the weighted sum of the label loss and
    the teacher loss, value and gradient.

    Args:
        labels: (batch, classes), 0 to 1.
        teacher_probs: (batch, classes), 0 to 1; any value where there is no teacher.
        has_teacher: (batch,), bool. A clip without one has its labels alone as target.
        config: how the two share.
        label_mask: (batch, classes), bool. A class whose label is unknown has the teacher's probability alone as
            target; None: all are known.

    Returns:
        (batch, classes), 0 to 1, at least float32; any value where there is neither label nor teacher.

    Raises:
        ValueError: the shapes disagree.
    """
    if labels.shape != teacher_probs.shape or has_teacher.shape != labels.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)}, teacher_probs {tuple(teacher_probs.shape)} and has_teacher "
            f"{tuple(has_teacher.shape)} aren't (batch, classes) twice and (batch,)"
        )
    teacher_probs = _float32_or_more(teacher_probs)
    labels = labels.to(teacher_probs)
    second_opinion = torch.where(has_teacher.bool()[:, None], teacher_probs, labels)  # (batch, classes)
    first_opinion = labels if label_mask is None else torch.where(label_mask.bool(), labels, second_opinion)
    return torch.lerp(first_opinion, second_opinion, config.teacher_weight)


def weighted_targets(
    labels: Tensor,
    teacher_probs: Tensor,
    has_teacher: Tensor,
    config: DistillConfig,
    label_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns each clip's target times what it weighs in the loss, and that weight: (batch, classes) each, 0 to 1.

    Args:
        labels: see `blend_targets`, as all others.
        teacher_probs: (batch, classes).
        has_teacher: (batch,), bool.
        config: how labels and teacher share, and what a clip weighs that has one of them alone.
        label_mask: (batch, classes), bool; what has neither a known label nor a teacher weighs nothing.
    """
    targets = blend_targets(labels, teacher_probs, has_teacher, config, label_mask)
    weight = _weights(targets, has_teacher.bool()[:, None], label_mask, config)
    return weight * targets, weight


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_probs: Tensor,
    has_teacher: Tensor,
    config: DistillConfig,
    *,
    label_mask: Tensor | None = None,
    mix: Mix | None = None,
    clip_weights: Tensor | None = None,
) -> Tensor:
    """Average the label loss and the teacher loss over a batch.

    Args:
        student_logits: (batch, classes), for the mixed clips if there is a `mix`.
        labels: (batch, classes), 0 to 1, of the clips as they were before mixing.
        teacher_probs: (batch, classes), 0 to 1, before mixing; any value where there is no teacher.
        has_teacher: (batch,), bool. A clip without one learns from its labels alone, at the weight that `config` says;
            so does its side of a mixed clip.
        config: how labels and teacher share.
        label_mask: (batch, classes), bool, before mixing: a class whose label is unknown is learned from the teacher
            alone, and not at all where there is none. None: all are known.
        mix: how the clips were mixed, if they were.
        clip_weights: (batch,), what each clip weighs in the average, not all 0; None: all weigh the same.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: the shapes disagree.

    Soft targets: Hinton et al. 2015, arXiv:1503.02531, Section 2, with a sigmoid for each class and neither the
    student's logits divided by the temperature nor the loss multiplied by its square, as in arXiv:2211.04772.
    """
    if config.without_logits == "full" and label_mask is None:
        targets = blend_targets(labels, teacher_probs, has_teacher, config)  # (batch, classes)
        return _average(clip_bce(student_logits, targets if mix is None else mix.of(targets)), clip_weights)
    weighted, weight = weighted_targets(labels, teacher_probs, has_teacher, config, label_mask)  # (batch, classes)
    if mix is not None:
        weighted, weight = mix.of(weighted), mix.of(weight)
    return _average(masked_bce(student_logits, weighted, weight), clip_weights)


def _average(losses: Tensor, clip_weights: Tensor | None) -> Tensor:
    return losses.mean() if clip_weights is None else (losses * clip_weights).sum() / clip_weights.sum()


def _weights(targets: Tensor, has_teacher: Tensor, label_mask: Tensor | None, config: DistillConfig) -> Tensor:
    """Returns what each class of each clip weighs in the loss: (batch, classes), 0 to 1."""
    label_alone, teacher_alone = 1.0, 1.0
    if config.without_logits == "share":
        label_alone, teacher_alone = 1 - config.teacher_weight, config.teacher_weight
    weight = torch.ones_like(targets).masked_fill(~has_teacher, label_alone)
    if label_mask is None:
        return weight
    is_unknown = ~label_mask.bool()
    return weight.masked_fill(is_unknown & has_teacher, teacher_alone).masked_fill(is_unknown & ~has_teacher, 0)
