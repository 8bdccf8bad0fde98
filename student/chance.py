"""Randomness that belongs to a clip's place in a batch, so that it does not matter how a batch is shared out."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chance:
    """What is random about the clips at hand, which may be only a part of a training step's batch.

    Whatever a clip needs is drawn for the whole batch, and each clip takes what lies at its own place. Two processes
    with half of the batch each therefore see what one process with all of it would have seen.
    """

    generator: torch.Generator
    """All randomness comes from it. What holds for the batch as a whole may be drawn from it directly."""

    places: Tensor
    """(batch,), int64, on the CPU: where each clip at hand stands in the whole batch."""

    whole: int
    """Clips of the whole batch."""

    @classmethod
    def of_batch(cls, clips: int, generator: torch.Generator) -> Self:
        """Describe a batch that is at hand as a whole."""
        return cls(generator, torch.arange(clips), clips)

    def rand(self, *shape: int) -> Tensor:
        """Draw from 0 to 1 for each clip: (batch, *shape), float32, on the CPU."""
        return torch.rand(self.whole, *shape, generator=self.generator)[self.places]

    def integers(self, low: int, high: int) -> Tensor:
        """Draw from low to high - 1 for each clip: (batch,), int64, on the CPU."""
        return torch.randint(low, high, (self.whole,), generator=self.generator)[self.places]
