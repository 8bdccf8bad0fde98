"""A student's loss: against labels, and against the soft targets of its teachers."""

from dataclasses import dataclass

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

    temperature: float = 1.0
    """Divides the teacher's logits before the sigmoid, above 0; more than 1 softens the targets."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"distill.teacher_weight is {self.teacher_weight}; choose a value from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature is {self.temperature}; choose a value above 0")


def teacher_probabilities(teacher_logits: Tensor, config: DistillConfig) -> Tensor:
    """Turn stored logits (batch, classes) into the probabilities that the student is to imitate, float32."""
    return (teacher_logits.float() / config.temperature).sigmoid()


def clip_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Score each clip by binary cross entropy, averaged over the classes.

    Args:
        logits: (batch, classes).
        targets: (batch, classes), 0 to 1.

    Returns:
        (batch,), float32, in nats.

    Raises:
        ValueError: the shapes disagree.
    """
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} aren't one (batch, classes)")
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)


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
        (batch,), float32, in nats.
    """
    logits = logits.float()
    # Cross entropy is softplus(logit) - target x logit, and linear in the clip's shares.
    return (label_mask * F.softplus(logits) - positives * logits).mean(dim=1)


def blend_targets(labels: Tensor, teacher_probs: Tensor, has_teacher: Tensor, config: DistillConfig) -> Tensor:
    """Returns each clip's target: its labels and its teacher's probabilities in one.

    Cross entropy is linear in its target, so the loss against this blend *is* the weighted sum of the label loss and
    the teacher loss, value and gradient.

    Args:
        labels: (batch, classes), 0 to 1.
        teacher_probs: (batch, classes), 0 to 1; any value where there is no teacher.
        has_teacher: (batch,), bool. A clip without one has its labels alone as target.
        config: how the two share.

    Returns:
        (batch, classes), float32, 0 to 1.

    Raises:
        ValueError: the shapes disagree.
    """
    if labels.shape != teacher_probs.shape or has_teacher.shape != labels.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)}, teacher_probs {tuple(teacher_probs.shape)} and has_teacher "
            f"{tuple(has_teacher.shape)} aren't (batch, classes) twice and (batch,)"
        )
    labels = labels.float()
    second_opinion = torch.where(has_teacher.bool()[:, None], teacher_probs.float(), labels)  # (batch, classes)
    return torch.lerp(labels, second_opinion, config.teacher_weight)


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_probs: Tensor,
    has_teacher: Tensor,
    config: DistillConfig,
    *,
    mix: Mix | None = None,
) -> Tensor:
    """Average the label loss and the teacher loss over a batch.

    Args:
        student_logits: (batch, classes), for the mixed clips if there is a `mix`.
        labels: (batch, classes), 0 to 1, of the clips as they were before mixing.
        teacher_probs: (batch, classes), 0 to 1, before mixing; any value where there is no teacher.
        has_teacher: (batch,), bool. A clip without one learns from its labels alone, at full weight; so does its side
            of a mixed clip.
        config: how labels and teacher share.
        mix: how the clips were mixed, if they were.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: the shapes disagree.

    Soft targets: Hinton et al. 2015, arXiv:1503.02531, Section 2, with a sigmoid for each class and neither the
    student's logits divided by the temperature nor the loss multiplied by its square, as in arXiv:2211.04772.
    """
    targets = blend_targets(labels, teacher_probs, has_teacher, config)
    if mix is not None:
        targets = mix.of(targets)
    return clip_bce(student_logits, targets).mean()
