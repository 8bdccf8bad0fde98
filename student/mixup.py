"""Mixup (Zhang et al. 2017, arXiv:1710.09412): trains on weighted sums of pairs of clips, sounds and targets alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MixupConfig:
    """How strongly clips are mixed."""

    alpha: float = 0.3
    """Both parameters of the Beta distribution that shares are drawn from; 0 switches mixup off."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.alpha >= 0:
            raise ValueError(f"mixup.alpha is {self.alpha}; choose 0 (off) or more")


@dataclass(frozen=True, slots=True)
class Mix:
    """Who is mixed with whom, and by how much."""

    partner: Tensor
    """(batch,), int64: the row that is mixed into each row."""

    share: Tensor
    """(batch,), float32, 0.5 to 1: what each row keeps of itself; the partner has the rest."""

    def of(self, rows: Tensor) -> Tensor:
        """Mix anything that has a row for each clip: waveforms, spectrograms or targets; shape and device stay."""
        share = self.share.to(rows).view(-1, *[1] * (rows.dim() - 1))  # (batch, 1, …)
        return share * rows + (1 - share) * rows[self.partner.to(rows.device)]


def draw_mix(batch: int, config: MixupConfig, generator: torch.Generator) -> Mix:
    """Draw partners and shares for a batch, as EfficientAT does: a larger and a smaller share for each pair.

    Args:
        batch: number of clips.
        config: the distribution.
        generator: all randomness comes from it; one state gives one mix.

    Returns:
        The mix, on the CPU.
    """
    partner = torch.randperm(batch, generator=generator, device=generator.device).cpu()
    # torch draws a Beta from its global generator only, so NumPy draws it, seeded by ours.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    if config.alpha == 0:
        return Mix(partner, torch.ones(batch))
    drawn = torch.from_numpy(np.random.default_rng(seed).beta(config.alpha, config.alpha, batch)).float()
    return Mix(partner, torch.maximum(drawn, 1 - drawn))
