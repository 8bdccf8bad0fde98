"""Augmentations that the recipe leaves out and other experiments use: roll, gain, masks. Each is off by default."""

from dataclasses import dataclass

import torch
from torch import Tensor

from student.front_end import MEL_SCALE, MEL_SHIFT
from student.randomness import Randomness, send

MASKED = MEL_SHIFT / MEL_SCALE  # a log power of 0 in the student's features: what EfficientAT writes into a mask


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


def augment_waveforms(
    waveforms: Tensor, config: AugmentConfig, randomness: Randomness, lengths: Tensor | None = None
) -> Tensor:
    """Roll and amplify (batch, samples) as the settings say; the shape stays.

    Args:
        waveforms: (batch, samples).
        config: the settings.
        randomness: draws what is done to each clip.
        lengths: (batch,): the samples of each row that are the clip, and that are rolled; None is all of them.
    """
    if config.roll_samples:
        waveforms = roll(waveforms, config.roll_samples, randomness, lengths)
    return gain(waveforms, config.gain_db, randomness) if config.gain_db else waveforms


def augment_features(
    features: Tensor, config: AugmentConfig, randomness: Randomness, frames: Tensor | None = None
) -> Tensor:
    """Mask bands and frames of (batch, 1, mels, frames) as the settings say; the shape stays.

    Args:
        features: (batch, 1, mels, frames).
        config: the settings.
        randomness: draws what is hidden of each clip.
        frames: (batch,): how many frames of each are the clip's own; None is all of them.
    """
    if config.mask_mels:
        features = mask(features, config.mask_mels, randomness, dim=2)
    return mask(features, config.mask_frames, randomness, dim=3, own=frames) if config.mask_frames else features


def roll(waveforms: Tensor, max_samples: int, randomness: Randomness, lengths: Tensor | None = None) -> Tensor:
    """Roll each of (batch, samples), or its first `lengths`, in a circle by -max_samples to max_samples."""
    shifts = randomness.integers(-max_samples, max_samples + 1).tolist()
    if lengths is None:
        return torch.stack([sound.roll(shift) for sound, shift in zip(waveforms, shifts, strict=True)])
    rolled = waveforms.clone()
    for sound, shift, length in zip(rolled, shifts, lengths.tolist(), strict=True):
        sound[:length] = sound[:length].roll(shift)
    return rolled


def gain(waveforms: Tensor, max_db: float, randomness: Randomness) -> Tensor:
    """Amplify each of (batch, samples) by -max_db to max_db decibels."""
    decibels = max_db * (2 * randomness.rand(1) - 1)  # (batch, 1)
    return waveforms * send(10 ** (decibels / 20), waveforms.device).to(waveforms.dtype)


def mask(features: Tensor, max_size: int, randomness: Randomness, *, dim: int, own: Tensor | None = None) -> Tensor:
    """Hide a run of 0 to `max_size` neighbours along one axis of each clip (SpecAugment, arXiv:1904.08779).

    Args:
        features: (batch, 1, mels, frames).
        max_size: longest run; at most the whole axis is hidden.
        randomness: draws each clip's run.
        dim: 2 hides mel bands, 3 hides frames.
        own: (batch,): how much of the axis each clip fills, from its start; None is all of it.
    """
    batch, size = len(features), features.shape[dim]
    draws = send(randomness.rand(2), features.device)  # (batch, 2)
    filled = torch.full((batch,), size) if own is None else own  # (batch,)
    filled = send(filled, features.device)
    length = draws[:, 0] * filled.clamp(max=max_size)
    start = (draws[:, 1] * (filled - length)).floor()  # (batch,)
    index = torch.arange(size, device=features.device)
    hidden = (index >= start[:, None]) & (index < (start + length.floor())[:, None])  # (batch, size)
    shape = [batch, 1, 1, 1]
    shape[dim] = size
    return features.masked_fill(hidden.view(shape), MASKED)
