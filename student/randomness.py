"""Random draws that belong to a clip's position in the global batch, however that is divided among processes."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a few drawn numbers from the CPU to a device without waiting until it has done all else."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True, slots=True)
class Randomness:
    """A generator, and which clips of a training step's global batch are at hand.

    Whatever a clip needs is drawn for the global batch, and each clip takes what lies at its own position. Two
    processes with half of the batch each therefore draw what one process with all of it would have drawn.
    """

    generator: torch.Generator
    """All randomness comes from it. What holds for the batch as a whole may be drawn from it directly."""

    positions: Tensor
    """(batch,), int64, on the CPU: where each clip at hand stands in the global batch."""

    global_batch_size: int
    """Clips of the global batch."""

    valid: Tensor | None = None
    """(batch,), bool, on the CPU: False for clips that only keep the batch's shape, with which nothing is mixed; None
    where there are none."""

    @classmethod
    def of_batch(cls, clips: int, generator: torch.Generator) -> Self:
        """Take a global batch that is at hand as a whole."""
        return cls(generator, torch.arange(clips), clips)

    def rand(self, *shape: int) -> Tensor:
        """Draw from 0 to 1 for each clip: (batch, *shape), float32, on the CPU."""
        return torch.rand(self.global_batch_size, *shape, generator=self.generator)[self.positions]

    def integers(self, low: int, high: int) -> Tensor:
        """Draw from low to high - 1 for each clip: (batch,), int64, on the CPU."""
        return torch.randint(low, high, (self.global_batch_size,), generator=self.generator)[self.positions]
