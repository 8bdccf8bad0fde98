"""How the original projects hear one clip of any length, re-told from their code: nothing of ours takes part.

AST (github.com/YuanGongND/ast, 31088be), `src/dataloader.py`; CED (github.com/RicherMans/CED, 60a0f54),
`models/audiotransformer.py`; PaSST (github.com/kkoutini/PaSST, 2a5c818), `audioset/dataset.py`.
"""

from collections.abc import Mapping

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F
from torchaudio.compliance import kaldi

SECONDS = (1.0, 2.3, 4.0, 8.1, 9.99, 10.0, 10.01, 20.0, 30.0)
"""Shorter than every teacher's input, just short of it, just beyond it, and far beyond."""


def fades(sample_rate_hz: int, seconds: tuple[float, ...] = SECONDS) -> list[Tensor]:
    """Give noise that fades in to its very end, (samples,) each, so that what is cut or added shows."""
    generator = torch.Generator().manual_seed(0)
    lengths = [round(one * sample_rate_hz) for one in seconds]
    noises = [torch.rand(length, generator=generator) - 0.5 for length in lengths]
    return [0.4 * noise * torch.linspace(0.05, 1, len(noise)) for noise in noises]


def passt_clip(waveform: Tensor, seconds: float = 10.0) -> Tensor:
    """(samples,) → (samples of the model's input,): cut, or silence added."""
    samples = round(seconds * 32_000)
    return F.pad(waveform[:samples], (0, max(0, samples - len(waveform))))


def ast_features(waveform: Tensor) -> Tensor:
    """(samples,) → (1024, 128): zeros are added before the features are normalised."""
    centred = waveform[None] - waveform.mean()
    features = kaldi.fbank(
        centred,
        htk_compat=True,
        sample_frequency=16_000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    features = F.pad(features[:1024], (0, 0, 0, max(0, 1024 - len(features))))
    return (features + 4.2677393) / (2 * 4.5689974)


def ced_probabilities(waveform: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """(samples,) → (classes,): a clip as it is, or the mean over pieces of 1012 frames, the last filled up with zeros.

    Args:
        waveform: at 16 kHz.
        weights: under the original's names.
        heads: of the attention.
    """
    mel = torchaudio.transforms.MelSpectrogram(f_max=8000, win_length=512, n_fft=512, hop_length=160, n_mels=64)
    decibels = torchaudio.transforms.AmplitudeToDB(top_db=120)(mel(waveform[None]))[:, None]  # (1, 1, mels, frames)
    mean, variance, scale, shift = (
        weights[f"init_bn.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    images = F.batch_norm(decibels.transpose(1, 2), mean, variance, scale, shift).transpose(1, 2)
    if images.shape[-1] > 1012:
        pieces = list(images.split(1012, dim=-1))
        pieces[-1] = F.pad(pieces[-1], (0, 1012 - pieces[-1].shape[-1]))
        images = torch.cat(pieces)  # (pieces, 1, mels, frames)
    patches = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    patches = patches + weights["time_pos_embed"][..., : patches.shape[-1]] + weights["freq_pos_embed"]
    sequence = patches.flatten(2).transpose(1, 2)  # (pieces, patches, dim)
    for block in range(sum(name.endswith(".norm1.weight") for name in weights)):
        sequence = _block(sequence, {name: weights[f"blocks.{block}.{name}"] for name in _BLOCK}, heads)
    pooled = _norm(sequence, weights, "norm", 1e-6).mean(dim=1)
    logits = _linear(_norm(pooled, weights, "outputlayer.0", 1e-5), weights, "outputlayer.1")
    return logits.sigmoid().mean(dim=0)


_BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def _block(sequence: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    qkv = _linear(_norm(sequence, weights, "norm1", 1e-6), weights, "attn.qkv")
    queries, keys, values = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (pieces, heads, patches, dim)
    attention = (queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(dim=-1)
    sequence = sequence + _linear((attention @ values).transpose(1, 2).flatten(2), weights, "attn.proj")
    hidden = F.gelu(_linear(_norm(sequence, weights, "norm2", 1e-6), weights, "mlp.fc1"))
    return sequence + _linear(hidden, weights, "mlp.fc2")


def _norm(values: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(values, weight.shape, weight, weights[f"{name}.bias"], eps)


def _linear(values: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])
