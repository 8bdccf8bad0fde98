"""Waveforms → the features that each family of transformers was trained on, to float tolerance of its own code.

Every front end takes (batch, samples) float32 waveforms, -1 to 1, at its sample rate. It computes in float32 whatever
precision the model runs in, since a logarithm of small powers does not survive anything less.

Clips have lengths of their own, and the families differ in what they make of that. A front end that is told the
`lengths` of its clips takes each as its original does:

| family | shorter clips | longer clips |
|---|---|---|
| PaSST | silence is added up to the model's length | are cut there |
| AST, EAT | frames of zeros are added to the features before they are normalised | features are cut |
| CED | stay as short as they are | are heard to their end, by the model piece after piece |
| BEATs | stay as short as they are | are heard to their end, in one piece |
| ATST | stay as short as they are | of the middle twelve seconds, pieces are heard |
| M2D | stay as short as they are, up to a patch | are heard to their end, by the model piece after piece |
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

# Stores hold what these configurations print, beside the teacher's name. A setting that comes later therefore stays out
# of it, or stores that were made before it would no longer be gone on with.


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
    """Kaldi's filter-bank features, as AST, EAT and BEATs have them; the families differ in these constants alone."""

    sample_rate_hz: int = 16000
    mels: int = 128
    window_samples: int = 400
    hop_samples: int = 160
    fft_samples: int = 512
    lowest_hz: float = 20.0
    highest_hz: float = 8000.0
    frames: int | None = 1024
    """Frames of the output; shorter clips are padded with zeros, before normalisation, and longer ones cut. None: clips
    are as long as they are."""
    window: Literal["hann", "povey"] = field(default="hann", repr=False)
    """Povey's is Kaldi's own: a Hann window to the power of 0.85."""
    scale: float = field(default=1.0, repr=False)
    """What waveforms are multiplied by; 32768 gives 16-bit sound's range, which Kaldi expects."""
    mean: float = -4.2677393
    deviation: float = 4.5689974
    subtract_mean: bool = True
    """Take the clip's mean off the waveform first; the original AST does, Hugging Face's version doesn't."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecibelMelConfig:
    """CED's and ATST's mel spectrogram in decibels."""

    sample_rate_hz: int = 16000
    mels: int = 64
    fft_samples: int = 512
    hop_samples: int = 160
    lowest_hz: float = 0.0
    highest_hz: float = 8000.0
    range_db: float = 120.0
    """Everything further than this below the loudest value of its clip is raised to there."""
    scaled_db: tuple[float, float] | None = field(default=None, repr=False)
    """Decibels that become -1 and 1; None leaves decibels."""
    middle_seconds: float | None = field(default=None, repr=False)
    """Of a longer clip, its middle of this length is heard; None hears it whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogMelConfig:
    """M2D's log-mel spectrogram, on Slaney's scale and with filters of equal areas."""

    sample_rate_hz: int = 16000
    mels: int = 80
    fft_samples: int = 400
    hop_samples: int = 160
    lowest_hz: float = 50.0
    highest_hz: float = 8000.0


FrontEndConfig = PasstMelConfig | KaldiFbankConfig | DecibelMelConfig | LogMelConfig


class FrontEnd(nn.Module, ABC):
    """Base: checks the waveforms and keeps the arithmetic in float32."""

    config: FrontEndConfig
    time_first: bool = False
    """Whether the features are (batch, frames, mels), as AST has them, and not (batch, mels, frames)."""
    longest_seconds: float
    """How much of a clip is heard at most."""
    own_length: str = ""
    """What becomes of clips that keep their lengths, in the words of a store's stamp; empty where silence or a cut
    brings all to one."""

    def forward(
        self,
        waveforms: Tensor,
        generator: Generator | None = None,
        edge_shifts_hz: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        finished: bool = True,
    ) -> Tensor:
        """Compute features.

        Args:
            waveforms: (batch, samples), -1 to 1, at `config.sample_rate_hz`.
            generator: where augmentation draws from in training mode; None is torch's global generator.
            edge_shifts_hz: (batch, 2): what is added to each clip's lower and upper band edge, in either mode, in
                place of what would be drawn. Families that were not trained on moving bands keep theirs where they are.
            lengths: (batch,), int64, on the CPU: the samples of each row that are the clip; zeros follow. Each clip is
                then taken as the family's original takes one of that length. None: every sample is heard as it is.
            finished: False gives the spectrogram alone, which front ends with equal `spectrogram_config` have in
                common; `finish` makes the features of it.

        Returns:
            float32 features in the layout that the family's model takes. Where `frames` counts fewer frames of a clip,
            anything may stand in the others.

        Raises:
            ValueError: the waveforms are no batch of one-channel clips, or are shorter than one window.
        """
        if lengths is not None and waveforms.ndim == 2:
            waveforms, lengths = self._fit(waveforms, lengths)
        shortest = self.config.fft_samples
        if waveforms.ndim != 2 or waveforms.shape[1] < shortest:
            raise ValueError(
                f"waveforms have shape {tuple(waveforms.shape)}; give (batch, samples) with {shortest} samples or more"
            )
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1])
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrogram = self.features(waveforms.float(), generator, edge_shifts_hz, lengths)
        return self.finish(spectrogram) if finished else spectrogram

    @property
    def spectrogram_config(self) -> FrontEndConfig:
        """What the spectrogram depends on, before `finish`; equal ones give equal spectrograms."""
        return self.config

    def finish(self, spectrogram: Tensor) -> Tensor:
        """Turn the spectrogram into the features that the family's model takes."""
        return spectrogram

    def frames(self, lengths: Tensor) -> Tensor | None:
        """Returns the frames of clips of these `lengths`, (batch,); None where all clips get equally many."""
        return None

    @abstractmethod
    def features(
        self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None, lengths: Tensor
    ) -> Tensor:
        """Compute the spectrogram of one family; `forward` describes arguments and result."""

    @property
    @abstractmethod
    def shortest_samples(self) -> int:
        """What silence makes of shorter clips, of which the original could make nothing, or nothing else."""

    def _fit(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cut what is not heard, and add silence to clips that are too short."""
        longest = min(self.longest_seconds * self.config.sample_rate_hz, max(lengths.tolist(), default=0))
        samples = max(round(longest), self.shortest_samples, self.config.fft_samples)
        waveforms = F.pad(waveforms[:, :samples], (0, max(0, samples - waveforms.shape[1])))
        return waveforms, lengths.clamp(self.shortest_samples, samples)

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

    def __init__(self, config: PasstMelConfig, clip_seconds: float = 10.0) -> None:
        super().__init__()
        self.config: PasstMelConfig = config
        self.longest_seconds = clip_seconds
        self.register_buffer("window", torch.hann_window(config.window_samples, periodic=False), persistent=False)
        self.register_buffer("filters", self._filters(config.lowest_hz, config.highest_hz), persistent=False)

    @property
    def shortest_samples(self) -> int:
        return round(self.longest_seconds * self.config.sample_rate_hz)

    def features(
        self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None, lengths: Tensor
    ) -> Tensor:
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
        return _moved_kaldi_filters(config.mels, config.fft_samples, config.sample_rate_hz, edges, self.filters.device)

    def _filters(self, lowest_hz: float, highest_hz: float) -> Tensor:
        """(mels, bins)."""
        config = self.config
        return _kaldi_filters(config.mels, config.fft_samples, config.sample_rate_hz, lowest_hz, highest_hz)


class KaldiFbank(FrontEnd):
    """(batch, samples) → (batch, frames, mels): `torchaudio.compliance.kaldi.fbank` for a whole batch at once."""

    time_first = True
    own_length = "own; features are filled up with zeros, or cut"
    window: Tensor
    filters: Tensor

    def __init__(self, config: KaldiFbankConfig) -> None:
        super().__init__()
        self.config: KaldiFbankConfig = config
        if config.frames is None:
            self.longest_seconds, self.own_length = math.inf, "own; whole"
        else:
            self.longest_seconds = self._samples(config.frames) / config.sample_rate_hz
        filters = _kaldi_filters(
            config.mels, config.fft_samples, config.sample_rate_hz, config.lowest_hz, config.highest_hz
        )
        window = torch.hann_window(config.window_samples, periodic=False)
        self.register_buffer("window", window if config.window == "hann" else window.pow(0.85), persistent=False)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # (bins, mels)

    @property
    def shortest_samples(self) -> int:
        return self._samples(1 if self.config.frames is not None else _PATCH_FRAMES)

    def frames(self, lengths: Tensor) -> Tensor | None:
        if self.config.frames is not None:
            return None
        beyond = lengths.clamp_min(self.shortest_samples) - self.config.window_samples
        return 1 + beyond // self.config.hop_samples

    def _samples(self, frames: int) -> int:
        return (frames - 1) * self.config.hop_samples + self.config.window_samples

    def features(
        self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None, lengths: Tensor
    ) -> Tensor:
        config = self.config
        if config.subtract_mean:
            own = send(lengths, waveforms.device).to(waveforms.dtype)  # (batch,)
            waveforms = waveforms - waveforms.sum(dim=1, keepdim=True) / own[:, None]
        if config.scale != 1:
            waveforms = waveforms * config.scale
        frames = waveforms.unfold(1, config.window_samples, config.hop_samples)  # (batch, frames, window)
        frames = frames[:, : config.frames]  # None: all
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        frames = (frames - 0.97 * previous) * self.window
        power = _power(torch.fft.rfft(frames, n=config.fft_samples))  # (batch, frames, bins)
        floor = torch.finfo(torch.float32).eps
        log_mel = (power @ self.filters).clamp_min(floor).log()  # (batch, frames, mels)
        if config.frames is None:
            return log_mel  # a network that takes any length is told which frames are the clips' own
        heard = 1 + (lengths - config.window_samples) // config.hop_samples  # (batch,), frames
        if (heard < log_mel.shape[1]).any():
            beyond = torch.arange(log_mel.shape[1]) >= heard[:, None]  # (batch, frames)
            log_mel = log_mel.masked_fill(send(beyond, log_mel.device)[..., None], 0.0)
        return F.pad(log_mel, (0, 0, 0, config.frames - log_mel.shape[1]))

    @property
    def spectrogram_config(self) -> KaldiFbankConfig:
        return replace(self.config, mean=0.0, deviation=0.5)

    def finish(self, spectrogram: Tensor) -> Tensor:
        return (spectrogram - self.config.mean) / (2 * self.config.deviation)


class CentredMel(FrontEnd):
    """Base of the front ends whose frames stand around every hop, the ends of a clip mirrored."""

    config: DecibelMelConfig | LogMelConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    longest_seconds = math.inf
    own_length = "own; whole"
    window: Tensor
    filters: Tensor

    def __init__(self, config: DecibelMelConfig | LogMelConfig, filters: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.fft_samples), persistent=False)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # (mels, bins)

    def frames(self, lengths: Tensor) -> Tensor:
        return 1 + lengths.clamp_min(self.shortest_samples) // self.config.hop_samples

    def mel(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """(batch, samples) → power in each band, (batch, mels, frames)."""
        spectrum = torch.stft(
            _mirror_ends(waveforms, lengths, self.config.fft_samples // 2),
            self.config.fft_samples,
            hop_length=self.config.hop_samples,
            window=self.window,
            center=False,
            return_complex=True,
        )
        return self.filters @ _power(spectrum)


class LogMel(CentredMel):
    """(batch, samples) → (batch, mels, frames): 10 s give 1001 frames."""

    def __init__(self, config: LogMelConfig) -> None:
        bins = config.fft_samples // 2 + 1
        edges = config.lowest_hz, config.highest_hz
        super().__init__(
            config,
            melscale_fbanks(bins, *edges, config.mels, config.sample_rate_hz, norm="slaney", mel_scale="slaney"),
        )

    @property
    def shortest_samples(self) -> int:
        return self.config.fft_samples

    def features(
        self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None, lengths: Tensor
    ) -> Tensor:
        return (self.mel(waveforms, lengths) + torch.finfo(torch.float32).eps).log()


class DecibelMel(CentredMel):
    """(batch, samples) → (batch, mels, frames): 10 s give 1001 frames."""

    config: DecibelMelConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: DecibelMelConfig) -> None:
        bins = config.fft_samples // 2 + 1
        super().__init__(
            config, melscale_fbanks(bins, config.lowest_hz, config.highest_hz, config.mels, config.sample_rate_hz)
        )
        if config.middle_seconds is not None:
            self.own_length = f"own; the middle {config.middle_seconds:g} s of longer ones"

    def frames(self, lengths: Tensor) -> Tensor:
        return super().frames(lengths.clamp_max(self._longest_samples))

    @property
    def _longest_samples(self) -> int:
        seconds = self.config.middle_seconds
        return _ENDLESS if seconds is None else round(seconds * self.config.sample_rate_hz)

    def _fit(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        longest = self._longest_samples
        if (lengths > longest).any():
            starts = ((lengths - longest).clamp_min(0) // 2).tolist()
            middles = [row[start : start + longest] for row, start in zip(waveforms, starts, strict=True)]
            waveforms, lengths = nn.utils.rnn.pad_sequence(middles, batch_first=True), lengths.clamp_max(longest)
        return super()._fit(waveforms, lengths)

    @property
    def shortest_samples(self) -> int:
        return (_PATCH_FRAMES - 1) * self.config.hop_samples

    def features(
        self, waveforms: Tensor, generator: Generator | None, edge_shifts_hz: Tensor | None, lengths: Tensor
    ) -> Tensor:
        decibels = 10 * self.mel(waveforms, lengths).clamp_min(1e-10).log10()  # (batch, mels, frames)
        # The original takes the loudest value of the whole batch; ours doesn't let a clip depend on its neighbours.
        heard = self.frames(lengths)  # (batch,)
        beyond = (torch.arange(decibels.shape[2]) >= heard[:, None])[:, None]  # (batch, 1, frames)
        quiet = decibels.masked_fill(send(beyond, decibels.device), -math.inf) if beyond.any() else decibels
        loudest = quiet.amax(dim=(1, 2), keepdim=True)
        return decibels.maximum(loudest - self.config.range_db)

    def finish(self, spectrogram: Tensor) -> Tensor:
        if self.config.scaled_db is None:
            return spectrogram
        lowest, highest = self.config.scaled_db
        return (spectrogram - lowest) / (highest - lowest) * 2.0 - 1.0


_ENDLESS = 2**62
_PATCH_FRAMES = 16
"""CED and BEATs tag no clip that is shorter than one of their patches."""


def _mirror_ends(waveforms: Tensor, lengths: Tensor, most: int) -> Tensor:
    """Mirror `most` samples at both ends of each clip, as a centred Fourier transform does; zeros may follow."""
    if (lengths == waveforms.shape[1]).all():
        return F.pad(waveforms, (most, most), mode="reflect")
    clips = [row[None, :length] for row, length in zip(waveforms, lengths.tolist(), strict=True)]
    return nn.utils.rnn.pad_sequence([F.pad(clip, (most, most), mode="reflect")[0] for clip in clips], batch_first=True)


def build_front_end(config: FrontEndConfig, clip_seconds: float = 10.0) -> FrontEnd:
    """Build the front end that a configuration describes.

    Args:
        config: of any family.
        clip_seconds: the model's input, for families that bring all clips to its length.
    """
    match config:
        case PasstMelConfig():
            return PasstMel(config, clip_seconds)
        case KaldiFbankConfig():
            return KaldiFbank(config)
        case DecibelMelConfig():
            return DecibelMel(config)
        case LogMelConfig():
            return LogMel(config)


def _kaldi_filters(mels: int, fft_samples: int, sample_rate_hz: int, lowest_hz: float, highest_hz: float) -> Tensor:
    """(mels, bins): Kaldi's triangles, of height 1; the bin at half the sample rate belongs to none."""
    filters, _ = get_mel_banks(mels, fft_samples, sample_rate_hz, lowest_hz, highest_hz, 100.0, -500.0, 1.0)
    return F.pad(filters, (0, 1))


def _moved_kaldi_filters(
    mels: int, fft_samples: int, sample_rate_hz: int, edges_hz: Sequence[tuple[float, float]], device: torch.device
) -> Tensor:
    """(batch, mels, bins): `_kaldi_filters` for each clip's lowest and highest edge, built on a device at once."""
    lowest, highest = ([1127.0 * math.log(1.0 + hz / 700.0) for hz in side] for side in zip(*edges_hz, strict=True))
    steps = [(high - low) / (mels + 1) for low, high in zip(lowest, highest, strict=True)]
    drawn = send(torch.tensor([lowest, steps], dtype=torch.float32), device)  # (2, batch)
    start, step = drawn[0, :, None, None], drawn[1, :, None, None]  # (batch, 1, 1) each
    band = torch.arange(mels, device=device)[:, None]  # (mels, 1)
    left, centre, right = start + band * step, start + (band + 1.0) * step, start + (band + 2.0) * step
    bins_hz = sample_rate_hz / fft_samples * torch.arange(fft_samples / 2, device=device)
    bins = 1127.0 * (1.0 + bins_hz / 700.0).log()  # (bins - 1,), in mel
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)  # (batch, mels, bins - 1)
    return F.pad(torch.minimum(rising, falling).clamp(min=0.0), (0, 1))


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a few numbers from the CPU to a device without waiting until it has done all else."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _power(spectrum: Tensor) -> Tensor:
    """Square the magnitude of complex numbers, three to six times faster than torch's ready-made ways."""
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
