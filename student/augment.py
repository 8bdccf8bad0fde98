"""Augmentations that the recipe leaves out and other experiments use: roll, gain, masks. Each is off by default."""

from dataclasses import dataclass

import torch
from torch import Tensor

from student.chance import Chance
from student.front_end import MEL_SCALE, MEL_SHIFT

MASKED = MEL_SHIFT / MEL_SCALE  # a log power of 0 as the student sees it: what EfficientAT writes into a mask


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Which augmentations are on, and how strong."""

    roll_samples: int = 0
    """Waveforms are rolled in a circle by at most this much either way, in samples; 0 is off, upstream's is 4000."""

    gain_db: float = 0.0
    """Waveforms get louder or softer by at most this much, in decibels; 0 is off."""

    mask_mels: int = 0
    """A mask hides up to this many neighbouring mel bands of each clip; 0 is off."""

    mask_frames: int = 0
    """A mask hides up to this many neighbouring frames of each clip; 0 is off."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if min(self.roll_samples, self.gain_db, self.mask_mels, self.mask_frames) < 0:
            raise ValueError(f"augment: every setting is 0 (off) or more, not {self}")


def augment_waveforms(waveforms: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    """Roll and amplify (batch, samples) as the settings say; the shape stays."""
    if config.roll_samples:
        waveforms = roll(waveforms, config.roll_samples, chance)
    return gain(waveforms, config.gain_db, chance) if config.gain_db else waveforms


def augment_features(features: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    """Mask bands and frames of (batch, 1, mels, frames) as the settings say; the shape stays."""
    if config.mask_mels:
        features = mask(features, config.mask_mels, chance, dim=2)
    return mask(features, config.mask_frames, chance, dim=3) if config.mask_frames else features


def roll(waveforms: Tensor, most_samples: int, chance: Chance) -> Tensor:
    """Roll each of (batch, samples) in a circle by -most_samples to most_samples."""
    shifts = chance.integers(-most_samples, most_samples + 1).tolist()
    return torch.stack([sound.roll(shift) for sound, shift in zip(waveforms, shifts, strict=True)])


def gain(waveforms: Tensor, most_db: float, chance: Chance) -> Tensor:
    """Amplify each of (batch, samples) by -most_db to most_db decibels."""
    decibels = most_db * (2 * chance.rand(1) - 1)  # (batch, 1)
    return waveforms * (10 ** (decibels / 20)).to(waveforms)


def mask(features: Tensor, most: int, chance: Chance, *, dim: int) -> Tensor:
    """Hide a run of 0 to `most` neighbours along one axis of each clip (SpecAugment, arXiv:1904.08779).

    Args:
        features: (batch, 1, mels, frames).
        most: longest run; at most the whole axis is hidden.
        chance: draws each clip's run.
        dim: 2 hides mel bands, 3 hides frames.
    """
    batch, size = len(features), features.shape[dim]
    draws = chance.rand(2).to(features.device)  # (batch, 2)
    length = draws[:, 0] * min(most, size)
    start = (draws[:, 1] * (size - length)).floor()  # (batch,)
    places = torch.arange(size, device=features.device)
    hidden = (places >= start[:, None]) & (places < (start + length.floor())[:, None])  # (batch, size)
    shape = [batch, 1, 1, 1]
    shape[dim] = size
    return features.masked_fill(hidden.view(shape), MASKED)
