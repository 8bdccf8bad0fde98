"""Several teachers' answers made one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ensemble_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average the logits of several teachers.

    Args:
        logits: one (batch, classes) tensor a teacher, before the sigmoid.
        weights: one number above 0 a teacher; only their ratios count.

    Returns:
        (batch, classes), float32: the weighted mean.

    Raises:
        ValueError: there is no teacher, the shapes disagree, or a weight is not a positive number.
    """
    if not logits:
        raise ValueError("an ensemble needs at least one teacher")
    if len(weights) != len(logits):
        raise ValueError(f"{len(logits)} teachers, but {len(weights)} weights; give one weight for each teacher")
    for place, (tensor, weight) in enumerate(zip(logits, weights, strict=True), start=1):
        if tensor.shape != logits[0].shape:
            raise ValueError(
                f"teacher {place} gives logits of shape {tuple(tensor.shape)}, the first one {tuple(logits[0].shape)}; "
                f"all teachers of an ensemble need the same classes"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"teacher {place} has weight {weight}; choose a number above 0")
    shares = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)  # (teachers,)
    stacked = torch.stack([tensor.float() for tensor in logits])  # (teachers, batch, classes)
    return torch.tensordot(shares.to(stacked), stacked, dims=1)
