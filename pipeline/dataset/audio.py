"""A clip's bytes → a mono waveform of the rate and length that a model wants.

What a file is goes by its content, never by its name, and how long it is by what is there, never by what a header says.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal

import numpy as np
import soxr

from pipeline.dataset.sound_reader import open_sound
from pipeline.errors import DecodeError

MAX_SAMPLES = 2**28
"""A waveform is at most this long, about 90 minutes at 48 kHz and 1 GiB; ask for fewer seconds of longer clips."""

LOUDEST_PEAK = 4.0
"""Lossy codecs overshoot full scale, and the models were trained on that. A peak beyond 12 dB over full scale is no
overshoot but a file in other units; it is scaled down to 1."""

_DECODING_EDITION = 2
"""Raised whenever the same bytes may become other samples, be it in the last bit: another decoder, another mix."""
_LOOK_AHEAD_SECONDS = 0.1
"""What the resampler's filter sees behind the cut: a clip's last samples don't depend on where reading stopped."""
_CANCELLED = 0.01
"""Where the mean of the channels has a peak of no more than this share of theirs, 40 dB less, they cancel out."""
_WRONG_SECONDS = 0.1
"""A header that is wrong by less about the length counts as right: encoders' padding."""

CANCEL_OUT = "sounds whose channels cancel out as mono"
SHORTER, LONGER = "sounds shorter than their header says", "sounds longer than their header says"
"""What is worth a word of a sound that can be used."""


@dataclass(frozen=True, slots=True)
class Sound:
    """A decoded clip."""

    samples: np.ndarray
    """(samples,), float32, mono, full scale is -1 to 1."""
    sample_rate_hz: int


@dataclass(frozen=True, slots=True)
class SoundFacts:
    """What a clip turned out to be when it was read from end to end."""

    format: str
    """The extension that fits the content, of those that `SoundReader` names."""
    sample_rate_hz: int
    """What it plays at; for Opus always 48,000, whatever it was made from."""
    channels: int
    frames: int
    """Samples of one channel that are really there."""
    bits: Literal[16, 24] = 16
    """How many are worth keeping."""
    has_video: bool = False
    notes: tuple[str, ...] = ()
    """What is worth a word: `CANCEL_OUT`, `SHORTER`, `LONGER`."""


@cache
def decoding_identity() -> str:
    """Returns what changes whenever bytes may become other samples, for keys of what was decoded and kept."""
    packages = (f"{name} {version(name)}" for name in ("soundfile", "av", "soxr"))
    return f"decoding {_DECODING_EDITION}, {', '.join(packages)}"


def decode(data: bytes, *, max_seconds: float | None = None) -> Sound:
    """Returns the beginning of a clip as mono: the mean of its channels.

    Samples beyond full scale are kept up to `LOUDEST_PEAK`; louder clips are scaled down to a peak of 1.

    Args:
        data: an encoded file of any of the formats in docs/ingest.md, "What can be read".
        max_seconds: how much is read at most; None is the whole clip.

    Raises:
        DecodeError: the bytes are no sound that can be read, or hold a corrupt one; `reason` can be counted.
    """
    blocks: list[np.ndarray] = []
    got = 0
    with open_sound(data, max_seconds) as sound:
        rate = sound.sample_rate_hz
        if max_seconds is not None and max_seconds * rate > MAX_SAMPLES:
            raise DecodeError("too long", f"{max_seconds} s at {rate} Hz")
        for block in sound.blocks:
            blocks.append(mix_channels(block))
            check_finite(blocks[-1], got)
            got += len(block)
            if got > MAX_SAMPLES:
                raise DecodeError("too long", f"more than {MAX_SAMPLES} samples; read fewer seconds")
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    peak = _peak(samples)
    return Sound(samples / np.float32(peak) if peak > LOUDEST_PEAK else samples, rate)


def inspect_sound(data: bytes, *, max_seconds: float = 3600.0) -> SoundFacts:
    """Reads a clip to its end and returns nothing but what it is.

    Args:
        data: an encoded file.
        max_seconds: a longer clip is not a clip; this bounds the time that a small hostile file can take.

    Raises:
        DecodeError: as `decode`.
    """
    frames, mono_peak, peak = 0, 0.0, 0.0
    with open_sound(data) as sound:
        for block in sound.blocks:
            mono_peak = max(mono_peak, check_finite(mix_channels(block), frames))
            if mono_peak < _CANCELLED * LOUDEST_PEAK:  # else it is loud enough
                peak = max(peak, _peak(block))
            frames += len(block)
            if frames > max_seconds * sound.sample_rate_hz:
                raise DecodeError("too long", f"more than {max_seconds:.0f} s")
        return SoundFacts(
            format=sound.format,
            sample_rate_hz=sound.sample_rate_hz,
            channels=sound.channels,
            frames=frames,
            bits=sound.bits,
            has_video=sound.has_video,
            notes=(
                *((CANCEL_OUT,) if mono_peak < _CANCELLED * peak else ()),
                *_length_notes(frames - (sound.claimed_samples or frames), sound.sample_rate_hz),
            ),
        )


def _length_notes(excess: int, sample_rate_hz: int) -> tuple[str, ...]:
    if abs(excess) <= _WRONG_SECONDS * sample_rate_hz:
        return ()
    return (SHORTER,) if excess < 0 else (LONGER,)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Change the sample rate of a mono waveform: (samples,) → (about samples * to_hz / from_hz,), float32.

    soxr at high quality: see docs/results.md, "Resampling", for what else was measured.
    """
    if from_hz == to_hz:
        return samples
    return soxr.resample(samples, from_hz, to_hz, quality="HQ")


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Cut a waveform at the end, or pad it there with silence: (samples,) → (length,)."""
    return samples[:length] if len(samples) >= length else np.pad(samples, (0, length - len(samples)))


def load_waveform(data: bytes, *, sample_rate_hz: int, seconds: float) -> np.ndarray:
    """Returns the first `seconds` of a clip as a model takes them: (round(seconds * sample_rate_hz),), float32, mono.

    Raises:
        DecodeError: as `decode`.
    """
    return load_waveforms(data, sample_rates_hz=(sample_rate_hz,), seconds=seconds)[sample_rate_hz]


def load_waveforms(data: bytes, *, sample_rates_hz: Iterable[int], seconds: float) -> dict[int, np.ndarray]:
    """Returns what `load_waveform` does, for several rates with one decode: rate in Hz → waveform.

    Raises:
        DecodeError: as `decode`.
    """
    sounds = load_whole_waveforms(data, sample_rates_hz=sample_rates_hz, max_seconds=seconds)
    return {rate: fit_length(samples, round(seconds * rate)) for rate, samples in sounds.items()}


def load_whole_waveforms(data: bytes, *, sample_rates_hz: Iterable[int], max_seconds: float) -> dict[int, np.ndarray]:
    """Returns a clip as long as it is at several rates, with one decode: rate in Hz → (samples,), float32, mono.

    Args:
        data: an encoded file.
        sample_rates_hz: what is wanted.
        max_seconds: longer clips are cut there; infinite for the whole clip.

    Raises:
        DecodeError: as `decode`.
    """
    whole = math.isinf(max_seconds)
    sound = decode(data, max_seconds=None if whole else max_seconds + _LOOK_AHEAD_SECONDS)
    resampled = {rate: resample(sound.samples, sound.sample_rate_hz, rate) for rate in sample_rates_hz}
    return resampled if whole else {rate: one[: round(max_seconds * rate)] for rate, one in resampled.items()}


def mix_channels(block: np.ndarray) -> np.ndarray:
    """Mean of the channels: (samples, channels) → (samples,)."""
    if block.shape[1] == 1:
        return block[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):  # what is no number is found and told afterwards
        mono = block[:, 0] + block[:, 1]
        for channel in range(2, block.shape[1]):  # several times faster than mean(axis=1) over so short an axis
            mono += block[:, channel]
        mono /= np.float32(block.shape[1])
    return mono


def check_finite(mono: np.ndarray, before: int) -> float:
    """Returns the peak of some samples, if all of them are numbers."""
    peak = _peak(mono)
    if not math.isfinite(peak):
        count = np.count_nonzero(~np.isfinite(mono))
        raise DecodeError("non-finite samples", f"{count} of the first {before + len(mono)}")
    return peak


def _peak(samples: np.ndarray) -> float:
    """Largest magnitude; infinite or NaN where a sample is."""
    return max(float(samples.max()), -float(samples.min()))
