"""Turns waveforms into the students' log-mel images, number for number as EfficientAT does."""

import math
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRE_EMPHASIS = 0.97
LOG_FLOOR = 1e-5
MEL_SHIFT, MEL_SCALE = 4.5, 5.0  # bring the log-mels of AudioSet to about -1 to 1
GROUPED_MELS = 16
"""Mel bands that are summed in one product of matrices: few, because each product runs over the bins of its bands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontEndConfig:
    """How sound becomes an image; the defaults are EfficientAT's."""

    sample_rate_hz: int = 32_000
    """Sampling rate of the waveforms, in hertz."""

    mels: int = 128
    """Number of mel bands, 4 or more."""

    hop_samples: int = 320
    """Step between two frames, in samples; 320 is 10 ms."""

    window_samples: int = 800
    """Length of the Hann window, in samples; at most `fft_samples`."""

    fft_samples: int = 1024
    """Length of the Fourier transform, in samples; even."""

    low_hz: float = 0.0
    """Lower edge of the lowest band, in hertz."""

    high_hz: float = 15_000.0
    """Upper edge of the highest band, in hertz."""

    low_jitter_hz: int = 10
    """In training the lower edge rises by 0 to this minus one, in whole hertz; 1 is no jitter."""

    high_jitter_hz: int = 2_000
    """In training the upper edge moves by at most half of this either way, in whole hertz; 1 is no jitter."""

    def __post_init__(self) -> None:
        """Refuse what no filter bank can be built from."""
        if self.mels < 4 or self.hop_samples < 1:
            raise ValueError(f"front end: {self.mels} mel bands, hop {self.hop_samples}; choose 4 and 1 or more")
        if not 1 <= self.window_samples <= self.fft_samples or self.fft_samples % 2:
            raise ValueError(f"front end: window {self.window_samples} must fit an even FFT, not {self.fft_samples}")
        if self.low_jitter_hz < 1 or self.high_jitter_hz < 1:
            raise ValueError("front end: a jitter range is 1 (none) or more hertz")
        highest_low = self.low_hz + self.low_jitter_hz - 1
        lowest_high = self.high_hz + self.high_jitter_hz // 2 - self.high_jitter_hz + 1
        highest_high = self.high_hz + self.high_jitter_hz // 2
        if not 0 <= highest_low < lowest_high or highest_high > self.sample_rate_hz / 2:
            raise ValueError(
                f"front end: the edges {self.low_hz} and {self.high_hz} Hz with their jitter must keep their order "
                f"and stay between 0 and {self.sample_rate_hz / 2} Hz"
            )

    def frames(self, samples: int) -> int:
        """Count the frames that `samples` samples give."""
        return 1 + (samples - 1) // self.hop_samples  # pre-emphasis costs one sample, centring adds one frame


class FrontEndKeywords(TypedDict, total=False):
    """The front end's settings under the names that EfficientAT's scripts give them, but for `hopsize`."""

    n_mels: int
    hopsize: int
    resample_rate: int
    window_size: int
    n_fft: int
    fmin: float
    fmax: float
    """By default half the sampling rate, less half of `fmax_aug_range`."""
    fmin_aug_range: int
    fmax_aug_range: int


def front_end_config(**keywords: Unpack[FrontEndKeywords]) -> FrontEndConfig:
    """Returns the front end that upstream's keywords describe; what is not given is upstream's default.

    Raises:
        TypeError: a keyword is none of `FrontEndKeywords`, such as one that no network takes either.
        ValueError: no filter bank can be built from the settings.
    """
    if unknown := keywords.keys() - FRONT_END_KEYWORDS:
        known = ", ".join(_OUR_NAMES)
        raise TypeError(f"{', '.join(sorted(unknown))}: no setting of the network, nor of its front end ({known})")
    settings: dict[str, Any] = {_OUR_NAMES[name]: value for name, value in keywords.items()}
    defaults = FrontEndConfig()
    rate = settings.get("sample_rate_hz", defaults.sample_rate_hz)
    jitter = settings.get("high_jitter_hz", defaults.high_jitter_hz)
    return FrontEndConfig(**{"high_hz": float(rate // 2 - jitter // 2), **settings})


_OUR_NAMES = {
    "n_mels": "mels",
    "hopsize": "hop_samples",
    "resample_rate": "sample_rate_hz",
    "window_size": "window_samples",
    "n_fft": "fft_samples",
    "fmin": "low_hz",
    "fmax": "high_hz",
    "fmin_aug_range": "low_jitter_hz",
    "fmax_aug_range": "high_jitter_hz",
}
FRONT_END_KEYWORDS = frozenset(_OUR_NAMES)


def mel_filters(
    config: FrontEndConfig, low_hz: float | Tensor, high_hz: float | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Build Kaldi's triangular filter bank, whose slopes are straight on the mel scale, without area normalisation.

    Args:
        config: gives the number of bands, the FFT length and the sampling rate.
        low_hz: lower edge of the lowest band; or (batch,), a bank each, on `device`.
        high_hz: upper edge of the highest band; likewise.
        device: where to build it.

    Returns:
        (mels, bins), or (batch, mels, bins); float32, 0 to 1; the bin at half the sampling rate is zero, as in Kaldi.

    The values are those of `torchaudio.compliance.kaldi.get_mel_banks`: edges in double, bands in single precision.
    """
    low_mel, high_mel = (
        1127.0 * (1.0 + _on_device(hz, device)[..., None] / 700.0).log() for hz in (low_hz, high_hz)
    )  # (1,) or (batch, 1)
    step = (high_mel - low_mel) / (config.mels + 1)
    edges = low_mel.float() + step.float() * torch.arange(config.mels + 2, device=device)  # (…, mels + 2)
    left, center, right = (edges[..., start : start + config.mels, None] for start in range(3))  # (…, mels, 1)
    bins_hz = config.sample_rate_hz / config.fft_samples * torch.arange(config.fft_samples // 2, device=device)
    bins_mel = 1127.0 * (1.0 + bins_hz / 700.0).log()  # (bins - 1,)
    rising, falling = (bins_mel - left) / (center - left), (right - bins_mel) / (right - center)  # (…, mels, bins - 1)
    return F.pad(torch.minimum(rising, falling).clamp(min=0.0), (0, 1))  # (…, mels, bins)


def _on_device(hz: float | Tensor, device: torch.device | str | None) -> Tensor:
    # A number that a kernel fills in need not be copied, which a GPU's host would wait for.
    if isinstance(hz, Tensor):
        return hz.to(device, finest_dtype(device))
    return torch.full((), hz, dtype=finest_dtype(device), device=device)


def finest_dtype(device: torch.device | str | None) -> torch.dtype:
    """Returns the finest precision that a device has; Apple's GPUs have no double."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64


def _mel(hz: float) -> float:
    return 1127.0 * math.log(1.0 + hz / 700.0)


def mel_groups(config: FrontEndConfig) -> list[tuple[slice, slice]]:
    """Split the bands into groups of neighbours, each with the bins that it can hear, however its edges jitter.

    Returns:
        (bands, bins) of each group. Outside of its bins, a group's filters are zero.
    """
    lowest, highest = _mel(config.low_hz), _mel(config.low_hz + config.low_jitter_hz - 1)
    top = config.high_hz + config.high_jitter_hz // 2
    smallest_top, largest_top = _mel(top - config.high_jitter_hz + 1), _mel(top)

    def bin_of(edge: int, low_mel: float, high_mel: float) -> float:
        mel = low_mel + (high_mel - low_mel) * edge / (config.mels + 1)
        return 700.0 * (math.exp(mel / 1127.0) - 1.0) * config.fft_samples / config.sample_rate_hz

    groups = []
    for first in range(0, config.mels, GROUPED_MELS):
        end = min(first + GROUPED_MELS, config.mels)
        # A band reaches from its left neighbour's centre to its right one's; a bin more for single precision.
        start_bin = math.floor(bin_of(first, lowest, smallest_top)) - 1
        end_bin = math.ceil(bin_of(end + 1, highest, largest_top)) + 2
        groups.append((slice(first, end), slice(max(start_bin, 0), min(end_bin, config.fft_samples // 2 + 1))))
    return groups


class LogMelFrontEnd(nn.Module):
    """The students' front end: waveforms in, log-mel images out, always in float32.

    In evaluation the bands are fixed and their filters are built once. In training the band edges are drawn once a
    batch (EfficientAT, arXiv:2211.04772, Section 3), which makes the student robust against other spectrograms.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, config: FrontEndConfig | None = None) -> None:
        super().__init__()
        self.config = config or FrontEndConfig()
        self._groups = mel_groups(self.config)
        self._build_constants(None)

    @property
    def shortest_samples(self) -> int:
        """Length of the shortest sound, in samples: its ends are mirrored by half a Fourier transform."""
        return self.config.fft_samples // 2 + 2

    def _build_constants(self, device: torch.device | None) -> None:
        config = self.config
        window = torch.hann_window(config.window_samples, periodic=False, device=device)
        filters = mel_filters(config, config.low_hz, config.high_hz, device)
        # Released checkpoints hold neither, so these don't belong into the state dict.
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "LogMelFrontEnd":
        super()._apply(fn, recurse)
        # `model.half()` must not round the constants and `to_empty` must not leave them empty: build them anew.
        self._build_constants(self.window.device)
        return self

    def forward(
        self,
        waveforms: Tensor,
        generator: torch.Generator | None = None,
        edge_shifts_hz: Tensor | None = None,
    ) -> Tensor:
        """Turn a batch of waveforms into log-mel images.

        Args:
            waveforms: (batch, samples), -1 to 1, at `config.sample_rate_hz`.
            generator: draws the band edges in training mode; None is torch's own generator. Unused in evaluation.
            edge_shifts_hz: (batch, 2): what is added to each clip's lower and upper band edge, in either mode; then
                nothing is drawn. An edge stays between 0 and half the sampling rate.

        Returns:
            (batch, 1, mels, frames), float32; `config.frames(samples)` frames.

        Raises:
            ValueError: the shape is another, or the sound is shorter than half the Fourier transform.
        """
        config = self.config
        if waveforms.dim() != 2 or waveforms.shape[1] < self.shortest_samples:
            raise ValueError(
                f"waveforms of shape {tuple(waveforms.shape)}; the front end takes (batch, samples) with more than "
                f"{self.shortest_samples - 1} samples"
            )
        with torch.autocast(device_type=waveforms.device.type, enabled=False):
            sound = waveforms.float()
            # Product and sum rounded one by one, as upstream: soft low bands show the difference to a fused step.
            sound = (sound[:, :-1] * -PRE_EMPHASIS).add_(sound[:, 1:])  # (batch, samples - 1)
            spectrum = torch.stft(
                sound,
                config.fft_samples,
                hop_length=config.hop_samples,
                win_length=config.window_samples,
                window=self.window,
                return_complex=True,
            )
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # (batch, bins, frames)
            if edge_shifts_hz is not None:
                bands = self._moved_filters(edge_shifts_hz) @ power  # (batch, mels, frames)
            else:
                filters = self._jittered_filters(generator) if self.training else self.filters  # (mels, bins)
                bands = torch.cat([filters[mels, bins] @ power[:, bins] for mels, bins in self._groups], dim=1)
            log_mels = bands.add_(LOG_FLOOR).log_()  # (batch, mels, frames)
            return log_mels.add_(MEL_SHIFT).div_(MEL_SCALE).unsqueeze(1)

    def _jittered_filters(self, generator: torch.Generator | None) -> Tensor:
        """Draw the edges as EfficientAT does and build the bank on the spot: (mels, bins)."""
        config = self.config
        device = generator.device if generator is not None else "cpu"
        rise, fall = (
            int(torch.randint(width, (), generator=generator, device=device))
            for width in (config.low_jitter_hz, config.high_jitter_hz)
        )
        high_hz = config.high_hz + config.high_jitter_hz // 2 - fall
        return mel_filters(config, config.low_hz + rise, high_hz, self.filters.device)

    def _moved_filters(self, edge_shifts_hz: Tensor) -> Tensor:
        """Build a bank for each clip: (batch, mels, bins)."""
        config, device = self.config, self.filters.device
        shifts_hz = edge_shifts_hz.to(device, finest_dtype(device))  # (batch, 2)
        low_hz, high_hz = (
            (edge_hz + shifts_hz[:, side]).clamp(0, config.sample_rate_hz / 2)  # (batch,)
            for side, edge_hz in enumerate((config.low_hz, config.high_hz))
        )
        return mel_filters(config, low_hz, high_hz, device)
