"""The students' front end as products of matrices, for runtimes without a Fourier transform of their own.

ONNX's STFT is slow on CPUs and missing on GPUs of browsers, so the transform is spelt out in two stages (Cooley and
Tukey 1965, https://doi.org/10.1090/S0025-5718-1965-0178586-1): a fifth of the multiplications of a plain product.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.front_end import (
    LOG_FLOOR,
    MEL_SCALE,
    MEL_SHIFT,
    PRE_EMPHASIS,
    FrontEndConfig,
    mel_filters,
    mel_groups,
)


class _Factors(NamedTuple):
    """A transform of `inner * outer` samples: n = inner * n1 + n2 and k = k1 + outer * k2."""

    inner: int
    outer: int
    window: int
    """Samples that aren't zero."""

    @property
    def rows(self) -> int:
        """How many n1 the window spans."""
        return -(-self.window // self.inner)

    @property
    def columns(self) -> int:
        """How many k1 there are; the others are these' complex conjugates."""
        return self.outer // 2 + 1

    @property
    def macs(self) -> int:
        """Multiplications for one frame: the first stage's and the second's."""
        return 2 * self.columns * self.rows * self.inner + self.columns * (2 * self.inner) ** 2


def _cheapest_factors(config: FrontEndConfig) -> _Factors:
    size = config.fft_samples
    divisors = [inner for inner in range(1, size + 1) if not size % inner]
    factors = [_Factors(inner, size // inner, config.window_samples) for inner in divisors]
    return min(factors, key=lambda some: some.macs)


def _turns(products: Tensor, size: int) -> Tensor:
    """Returns cos and -sin of 2 pi * products / size, float64, stacked in front; whole turns are taken off first."""
    phases = products.remainder(size).double() * (2 * math.pi / size)
    return torch.stack([phases.cos(), -phases.sin()])


class DftFrontEnd(nn.Module):
    """What `LogMelFrontEnd` computes in evaluation, to rounding, from operators that every runtime has."""

    window: Tensor
    first: Tensor
    second: Tensor
    order: Tensor

    def __init__(self, config: FrontEndConfig, factors: tuple[int, int] | None = None) -> None:
        """Build the matrices, in double precision before they are rounded.

        Args:
            config: the front end's settings.
            factors: lengths of the second and of the first stage, whose product is `fft_samples`; None is the cheapest.
        """
        super().__init__()
        self.config = config
        self._factors = _Factors(*factors, config.window_samples) if factors else _cheapest_factors(config)
        inner, outer, rows, columns = (getattr(self._factors, name) for name in ("inner", "outer", "rows", "columns"))
        window = torch.hann_window(config.window_samples, periodic=False)
        self.register_buffer("window", F.pad(window, (0, rows * inner - config.window_samples))[:, None])

        n1, n2, k1, k2 = (torch.arange(size) for size in (rows, inner, columns, inner))
        first = _turns(k1[:, None] * n1, outer)  # (2, columns, rows)
        self.register_buffer("first", first.transpose(0, 1).reshape(2 * columns, rows).float())
        bins = k1[:, None] + outer * k2  # (columns, inner)
        cosine, sine = _turns(bins[..., None] * n2, config.fft_samples)  # (columns, inner, inner) both
        real, imaginary = torch.cat([cosine, -sine], dim=2), torch.cat([sine, cosine], dim=2)
        self.register_buffer("second", torch.cat([real, imaginary], dim=1).float())  # (columns, 2 inner, 2 inner)
        self._build_bands(bins.flatten())

    def _build_bands(self, bins: Tensor) -> None:
        """Gather the bins of each group of bands into neighbouring rows, so that a product meets few zeros."""
        config = self.config
        filters = mel_filters(config, config.low_hz, config.high_hz)  # (mels, bins)
        row_of_bin = {min(k, config.fft_samples - k): row for row, k in enumerate(bins.tolist())}
        groups = mel_groups(config)
        first_bin = min(span.start for _, span in groups)
        end_bin = max(span.stop for _, span in groups)
        self.register_buffer("order", torch.tensor([row_of_bin[k] for k in range(first_bin, end_bin)]))
        self._groups = [slice(span.start - first_bin, span.stop - first_bin) for _, span in groups]
        for number, (mels, span) in enumerate(groups):
            self.register_buffer(f"filters_{number}", filters[mels, span].contiguous())

    @property
    def macs_per_frame(self) -> int:
        """Multiplications for one frame, of the transform and the bands."""
        bands = sum(self.get_buffer(f"filters_{group}").numel() for group in range(len(self._groups)))
        return self._factors.macs + bands

    def forward(self, waveforms: Tensor) -> Tensor:
        """Turn waveforms into log-mel images.

        Args:
            waveforms: (batch, samples), float32, -1 to 1; at least `LogMelFrontEnd.shortest_samples`.

        Returns:
            (batch, 1, mels, frames), float32.
        """
        sound = waveforms[:, 1:] - waveforms[:, :-1] * PRE_EMPHASIS  # (batch, samples - 1)
        batch, inner, columns = waveforms.shape[0], self._factors.inner, self._factors.columns
        framed = self._frame(sound) * self.window  # (batch, rows * inner, frames)
        halfway = self.first @ framed.view(batch, self._factors.rows, -1)  # (batch, 2 columns, inner * frames)
        spectrum = self.second @ halfway.view(batch, columns, 2 * inner, -1)  # (batch, columns, 2 inner, frames)
        power = spectrum[:, :, :inner].square() + spectrum[:, :, inner:].square()  # (batch, columns, inner, frames)
        power = power.flatten(1, 2)[:, self.order]  # (batch, bins, frames)
        bands = torch.cat(
            [self.get_buffer(f"filters_{group}") @ power[:, bins] for group, bins in enumerate(self._groups)], dim=1
        )  # (batch, mels, frames)
        return (((bands + LOG_FLOOR).log() + MEL_SHIFT) / MEL_SCALE).unsqueeze(1)

    def _frame(self, sound: Tensor) -> Tensor:
        """Cut (batch, samples) into overlapping frames, (batch, rows * inner, frames), centred as `torch.stft` does."""
        config, span = self.config, len(self.window)
        hop, blocks = config.hop_samples, -(-span // config.hop_samples)
        before = config.fft_samples // 2 - (config.fft_samples - config.window_samples) // 2
        after = config.window_samples - before
        frames = sound.shape[1] // hop + 1
        mirrored = F.pad(sound[:, None], (before, after), mode="reflect")[:, 0]
        padded = F.pad(mirrored, (0, (frames + blocks) * hop - mirrored.shape[1]))  # by a positive number, always
        hops = padded.view(-1, frames + blocks, hop).transpose(1, 2)  # (batch, hop, frames + blocks)
        parts = [
            hops[:, : min(hop, span - block * hop), block : block + frames] for block in range(blocks)
        ]  # each (batch, up to hop, frames)
        return torch.cat(parts, dim=1)
