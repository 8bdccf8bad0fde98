"""Waveforms → the features that each family of transformers was trained on, to float tolerance of its own code.

Every front end takes (batch, samples) float32 waveforms, -1 to 1, at its sample rate. It computes in float32 whatever
precision the model runs in, since a logarithm of small powers does not survive anything less.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks


@dataclass(frozen=True, kw_only=True, slots=True)
class PasstMelConfig:
    """PaSST's log-mel spectrogram; two teachers with equal configurations can share one spectrogram."""

    sample_rate_hz: int = 32000
    mels: int = 128
    window_samples: int = 800
    hop_samples: int = 320
    fft_samples: int = 1024
    lowest_hz: float = 0.0
    highest_hz: float = 15000.0
    lowest_jitter_hz: int = 10
    """In training mode the lower band edge rises by 0 to this less 1 Hz, drawn once a batch; 1 is no jitter."""
    highest_jitter_hz: int = 2000
    """In training mode the upper band edge moves within this width, centred; 1 is no jitter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KaldiFbankConfig:
    """AST's Kaldi filter-bank features."""

    sample_rate_hz: int = 16000
    mels: int = 128
    window_samples: int = 400
    hop_samples: int = 160
    fft_samples: int = 512
    lowest_hz: float = 20.0
    highest_hz: float = 8000.0
    frames: int = 1024
    """Frames of the output; shorter clips are padded with zeros, before normalisation, and longer ones cut."""
    mean: float = -4.2677393
    deviation: float = 4.5689974
    subtract_mean: bool = True
    """Take the clip's mean off the waveform first; the original AST does, Hugging Face's version doesn't."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecibelMelConfig:
    """CED's mel spectrogram in decibels."""

    sample_rate_hz: int = 16000
    mels: int = 64
    fft_samples: int = 512
    hop_samples: int = 160
    lowest_hz: float = 0.0
    highest_hz: float = 8000.0
    range_db: float = 120.0
    """Everything further than this below the loudest value of its clip is raised to there."""


FrontEndConfig = PasstMelConfig | KaldiFbankConfig | DecibelMelConfig


class FrontEnd(nn.Module, ABC):
    """Base: checks the waveforms and keeps the arithmetic in float32."""

    config: FrontEndConfig
    time_first: bool = False
    """Whether the features are (batch, frames, mels), as AST has them, and not (batch, mels, frames)."""

    def forward(
        self, waveforms: Tensor, generator: Generator | None = None, edge_shifts_hz: Tensor | None = None
    ) -> Tensor:
        """Compute features.

        Args:
            waveforms: (batch, samples), -1 to 1, at `config.sample_rate_hz`.
            generator: where augmentation draws from in training mode; None is torch's global generator.
            edge_shifts_hz: (batch, 2): what is added to each clip's lower and upper band edge, in either mode, in
                place of what would be drawn. Families that were not trained on moving bands keep theirs where they are.

        Returns:
            float32 features in the layout that the family's model takes.

        Raises:
            ValueError: the waveforms are no batch of one-channel clips, or are shorter than one window.
        """
        shortest = self.config.fft_samples
        if waveforms.ndim != 2 or waveforms.shape[1] < shortest:
            raise ValueError(
                f"waveforms have shape {tuple(waveforms.shape)}; give (batch, samples) with {shortest} samples or more"
            )
        with torch.autocast(waveforms.device.type, enabled=False):
            return self.features(waveforms.float(), generator, edge_shifts_hz)

    @abstractmethod
    def features(self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None) -> Tensor:
        """Compute the features of one family; `forward` describes arguments and result."""

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Move with the model, but keep windows and filters in float32 when the weights become half precision."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return repr(self.config)


class PasstMel(FrontEnd):
    """(batch, samples) → (batch, mels, frames): 10 s give 1000 frames."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: PasstMelConfig) -> None:
        super().__init__()
        self.config: PasstMelConfig = config
        self.register_buffer("window", torch.hann_window(config.window_samples, periodic=False), persistent=False)
        self.register_buffer("filters", self._filters(config.lowest_hz, config.highest_hz), persistent=False)

    def features(self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None) -> Tensor:
        config = self.config
        emphasised = waveforms[:, 1:] - 0.97 * waveforms[:, :-1]  # (batch, samples - 1)
        spectrum = torch.stft(
            emphasised,
            config.fft_samples,
            hop_length=config.hop_samples,
            win_length=config.window_samples,
            window=self.window,
            return_complex=True,
        )
        power = _power(spectrum)  # (batch, bins, frames)
        if edge_shifts_hz is not None:
            filters = self._moved_filters(edge_shifts_hz)  # (batch, mels, bins)
        else:
            filters = self._jittered_filters(generator) if self.training else self.filters  # (mels, bins)
        log_mel = (filters @ power + 1e-5).log()  # (batch, mels, frames)
        return (log_mel + 4.5) / 5

    def _jittered_filters(self, generator: Generator | None) -> Tensor:
        def draw(width: int) -> int:
            device = generator.device if generator is not None else None
            return int(torch.randint(width, (), generator=generator, device=device))

        config = self.config
        lowest_hz = config.lowest_hz + draw(config.lowest_jitter_hz)
        highest_hz = config.highest_hz + config.highest_jitter_hz // 2 - draw(config.highest_jitter_hz)
        return self._filters(lowest_hz, highest_hz).to(self.filters.device)

    def _moved_filters(self, edge_shifts_hz: Tensor) -> Tensor:
        """(batch, mels, bins)."""
        config = self.config
        edges = [
            (config.lowest_hz + low, min(config.highest_hz + high, config.sample_rate_hz / 2))
            for low, high in edge_shifts_hz.tolist()
        ]
        return torch.stack([self._filters(lowest, highest) for lowest, highest in edges]).to(self.filters.device)

    def _filters(self, lowest_hz: float, highest_hz: float) -> Tensor:
        """(mels, bins)."""
        config = self.config
        return _kaldi_filters(config.mels, config.fft_samples, config.sample_rate_hz, lowest_hz, highest_hz)


class KaldiFbank(FrontEnd):
    """(batch, samples) → (batch, frames, mels): `torchaudio.compliance.kaldi.fbank` for a whole batch at once."""

    time_first = True
    window: Tensor
    filters: Tensor

    def __init__(self, config: KaldiFbankConfig) -> None:
        super().__init__()
        self.config: KaldiFbankConfig = config
        filters = _kaldi_filters(
            config.mels, config.fft_samples, config.sample_rate_hz, config.lowest_hz, config.highest_hz
        )
        self.register_buffer("window", torch.hann_window(config.window_samples, periodic=False), persistent=False)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # (bins, mels)

    def features(self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None) -> Tensor:
        config = self.config
        if config.subtract_mean:
            waveforms = waveforms - waveforms.mean(dim=1, keepdim=True)
        frames = waveforms.unfold(1, config.window_samples, config.hop_samples)  # (batch, frames, window)
        frames = frames[:, : config.frames]
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        frames = (frames - 0.97 * previous) * self.window
        power = _power(torch.fft.rfft(frames, n=config.fft_samples))  # (batch, frames, bins)
        floor = torch.finfo(torch.float32).eps
        log_mel = (power @ self.filters).clamp_min(floor).log()  # (batch, frames, mels)
        log_mel = F.pad(log_mel, (0, 0, 0, config.frames - log_mel.shape[1]))
        return (log_mel - config.mean) / (2 * config.deviation)


class DecibelMel(FrontEnd):
    """(batch, samples) → (batch, mels, frames): 10 s give 1001 frames."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: DecibelMelConfig) -> None:
        super().__init__()
        self.config: DecibelMelConfig = config
        bins = config.fft_samples // 2 + 1
        filters = melscale_fbanks(bins, config.lowest_hz, config.highest_hz, config.mels, config.sample_rate_hz)
        self.register_buffer("window", torch.hann_window(config.fft_samples), persistent=False)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # (mels, bins)

    def features(self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None) -> Tensor:
        config = self.config
        spectrum = torch.stft(
            waveforms, config.fft_samples, hop_length=config.hop_samples, window=self.window, return_complex=True
        )
        power = _power(spectrum)  # (batch, bins, frames)
        decibels = 10 * (self.filters @ power).clamp_min(1e-10).log10()  # (batch, mels, frames)
        # The original takes the loudest value of the whole batch; ours doesn't let a clip depend on its neighbours.
        loudest = decibels.amax(dim=(1, 2), keepdim=True)
        return decibels.maximum(loudest - config.range_db)


def build_front_end(config: FrontEndConfig) -> FrontEnd:
    """Build the front end that a configuration describes."""
    match config:
        case PasstMelConfig():
            return PasstMel(config)
        case KaldiFbankConfig():
            return KaldiFbank(config)
        case DecibelMelConfig():
            return DecibelMel(config)


def _kaldi_filters(mels: int, fft_samples: int, sample_rate_hz: int, lowest_hz: float, highest_hz: float) -> Tensor:
    """(mels, bins): Kaldi's triangles, of height 1; the bin at half the sample rate belongs to none."""
    filters, _ = get_mel_banks(mels, fft_samples, sample_rate_hz, lowest_hz, highest_hz, 100.0, -500.0, 1.0)
    return F.pad(filters, (0, 1))


def _power(spectrum: Tensor) -> Tensor:
    """Square the magnitude of complex numbers, three to six times faster than torch's ready-made ways."""
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
