"""Mixup (Zhang et al. 2017, arXiv:1710.09412): trains on weighted sums of pairs of clips, sounds and targets alike."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from student.randomness import Randomness, send

MixedThing = Literal["spectrogram", "waveform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixupConfig:
    """How strongly clips are mixed, and what of them."""

    alpha: float = 0.3
    """Both parameters of the Beta distribution that lambda is drawn from; 0 switches mixup off."""

    rate: float = 1.0
    """Share of the clips that are mixed, 0 to 1; EfficientAT mixes waveforms at 0.5, with alpha 2."""

    of: MixedThing = "spectrogram"
    """What is mixed: the log-mel images, or the sounds before them, each without its mean."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.alpha >= 0:
            raise ValueError(f"mixup.alpha is {self.alpha}; choose 0 (off) or more")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"mixup.rate is {self.rate}; choose a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Mix:
    """Who is mixed with whom, and by how much."""

    partner: Tensor
    """(batch,), int64: the row that is mixed into each row."""

    lam: Tensor
    """(batch,), float32, 0.5 to 1: mixup's lambda, what each row keeps of itself; the partner has the rest."""

    def on(self, device: torch.device) -> "Mix":
        """Copy to a device, once for all that is mixed there."""
        return Mix(send(self.partner, device), send(self.lam, device))

    def of(self, rows: Tensor) -> Tensor:
        """Mix anything that has a row for each clip: waveforms, spectrograms or targets; shape and device stay."""
        lam = self.lam.to(rows).view(-1, *[1] * (rows.dim() - 1))  # (batch, 1, …)
        return lam * rows + (1 - lam) * rows[self.partner.to(rows.device)]

    def of_waveforms(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mix sounds after taking their means off, so that no click of direct current is mixed in.

        What keeps all of itself keeps its mean too, as in PaSST and EfficientAT.

        Args:
            waveforms: (batch, samples).
            lengths: (batch,): the samples of each row that are the clip; zeros follow. None: all of them.
        """
        centred = _centred(waveforms, lengths)
        mixed = (self.lam < 1).to(waveforms.device)[:, None]  # (batch, 1)
        return torch.where(mixed, self.of(centred), waveforms)

    def of_lengths(self, lengths: Tensor) -> Tensor:
        """Returns how long the mixed clips are, (batch,): a sound lasts as long as the longer one of its two."""
        return torch.where(self.lam < 1, lengths.maximum(lengths[self.partner]), lengths)


def _centred(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return waveforms - waveforms.mean(dim=1, keepdim=True)
    own = torch.arange(waveforms.shape[1]) < lengths[:, None]  # (batch, samples)
    means = waveforms.sum(dim=1) / lengths.to(waveforms)  # (batch,)
    return (waveforms - means[:, None]).masked_fill(~own.to(waveforms.device), 0.0)


def draw_mix(randomness: Randomness, config: MixupConfig, *, distance: Literal[1, 2] = 1) -> Mix:
    """Pair clips and draw lambda for each, the larger one of lambda and 1 - lambda as EfficientAT does.

    Neighbours in the batch mix with each other: its order is random already, so a partner can be any clip but the clip
    itself. Pairs, unlike EfficientAT's chains of partners, never have to be torn apart: a process that has both of them
    needs no other process. A clip whose neighbour is not at hand stays as it is.

    Args:
        randomness: which clips of the batch are at hand, and all randomness.
        config: the distribution.
        distance: 1 pairs the clips 0 and 1, 2 and 3, …; 2 pairs 0 and 2, 1 and 3, …, so that clips that are mixed twice
            meet two others. A process that has its share of the batch in fours has both of a pair.

    Returns:
        The mix of the clips at hand, on the CPU.
    """
    positions, clips, size = randomness.positions, len(randomness.positions), randomness.global_batch_size
    row_at = torch.full((size + 1,), -1)  # (global batch + 1,), one more for the partner of an odd last clip
    row_at[positions] = torch.arange(clips)
    if randomness.valid is not None:
        row_at[positions[~randomness.valid]] = -1
    partner = row_at[(positions ^ distance).clamp(max=size)]  # 0 and 1 are a pair, 2 and 3, …
    alone = partner < 0
    # torch draws a Beta from its global generator only, so NumPy draws it, seeded by ours.
    random = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=randomness.generator)))
    if config.alpha == 0:
        return Mix(torch.where(alone, torch.arange(clips), partner), torch.ones(clips))
    drawn = torch.from_numpy(random.beta(config.alpha, config.alpha, size)).float()[positions]
    stays = torch.from_numpy(random.random(size))[positions] >= config.rate
    lam = torch.maximum(drawn, 1 - drawn).masked_fill(alone | stays, 1.0)
    return Mix(torch.where(alone, torch.arange(clips), partner), lam)
