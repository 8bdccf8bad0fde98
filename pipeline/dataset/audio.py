"""A clip's bytes → a mono waveform of the rate and length that a model wants.

What a file is goes by its content, never by its name, and nothing is allocated by what a header claims: samples are
read block by block until the stream ends or enough are there.
"""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from pipeline.dataset.ogg import check_ogg
from pipeline.errors import DecodeError

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 768_000
MAX_CHANNELS = 64
MAX_SAMPLES = 2**28
"""A waveform is at most this long, about 90 minutes at 48 kHz and 1 GiB; ask for fewer seconds of longer clips."""

LOUDEST_PEAK = 4.0
"""Lossy codecs overshoot full scale, and the models were trained on that. A peak beyond 12 dB over full scale is no
overshoot but a file in other units; it is scaled down to 1."""

_BLOCK_VALUES = 2**21
"""Samples of all channels read at once: 20 s of a 48 kHz stereo file, so that an ordinary clip is one block."""
_MAX_MISSING = 0.02
"""A stream may end this share of its length, or a tenth of a second, before its header says so: encoders' padding."""
_LOOK_AHEAD_SECONDS = 0.1
"""What the resampler's filter sees behind the cut: a clip's last samples don't depend on where reading stopped."""

_SIGNATURES = (
    (0, b"RIFF", "wav"),
    (0, b"RIFX", "wav"),
    (0, b"RF64", "wav"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"FORM", "aiff"),
    (0, b".snd", "au"),
    (0, b"caff", "caf"),
    (0, b"ID3", "mp3"),
)
_FOREIGN_SIGNATURES = (
    (4, b"ftyp", "AAC or ALAC in MP4"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"\x30\x26\xb2\x75", "WMA"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"wvpk", "WavPack"),
)


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
    """The extension that fits the content: wav, flac, mp3, ogg (Vorbis), opus, aiff, w64, au, caf."""
    sample_rate_hz: int
    channels: int
    frames: int
    """Samples of one channel that are really there."""


def decode(data: bytes, *, max_seconds: float | None = None) -> Sound:
    """Decode the beginning of a clip to mono: the mean of its channels.

    Samples beyond full scale are kept up to `LOUDEST_PEAK`; louder clips are scaled down to a peak of 1.

    Args:
        data: an encoded file: WAV (also RF64), Wave64, FLAC, MP3, Ogg Vorbis, Opus, AIFF, AU or CAF.
        max_seconds: how much is read at most; None is the whole clip.

    Raises:
        DecodeError: the bytes are no sound that can be read, or hold a corrupt one; `reason` can be counted.
    """
    with _open(data) as file:
        rate = file.samplerate
        wanted = MAX_SAMPLES + 1 if max_seconds is None else max(1, math.ceil(max_seconds * rate))
        if wanted > MAX_SAMPLES and max_seconds is not None:
            raise DecodeError("too long", f"{max_seconds} s at {rate} Hz")
        blocks = list(_blocks(file, wanted))
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if len(samples) > MAX_SAMPLES:
        raise DecodeError("too long", f"more than {MAX_SAMPLES} samples; read fewer seconds")
    peak = _peak(samples)
    return Sound(samples / np.float32(peak) if peak > LOUDEST_PEAK else samples, rate)


def inspect_sound(data: bytes, *, max_seconds: float = 3600.0) -> SoundFacts:
    """Read a clip to its end, keeping nothing but what it is.

    Args:
        data: an encoded file.
        max_seconds: a longer clip is not a clip; this bounds the time that a small hostile file can take.

    Raises:
        DecodeError: as `decode`.
    """
    with _open(data) as file:
        wanted = math.ceil(max_seconds * file.samplerate) + 1
        frames = sum(len(block) for block in _blocks(file, wanted))
        if frames >= wanted:
            raise DecodeError("too long", f"more than {max_seconds:.0f} s")
        return SoundFacts(_extension(file), file.samplerate, file.channels, frames)


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


class _Memory(io.BytesIO):
    """Bytes as a file that never raises: an exception inside libsndfile's callbacks would be printed, not raised."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.tell(), len(self.getbuffer()))[whence]
        return super().seek(min(max(base + offset, 0), len(self.getbuffer())))


class _ForwardFile(soundfile.SoundFile):
    """A sound that is read from its beginning on. soundfile would seek to where it is after each read of another file.

    In a compressed stream that costs up to a tenth of all decoding.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def _open(data: bytes) -> Iterator[soundfile.SoundFile]:
    if not data:
        raise DecodeError("empty file")
    if _container(data) == "ogg":
        check_ogg(data)
    try:
        file = _ForwardFile(_Memory(data))
    except soundfile.SoundFileError as error:
        raise DecodeError("unreadable header", _message(error)) from error
    with file:
        if not LOWEST_RATE_HZ <= file.samplerate <= HIGHEST_RATE_HZ:
            raise DecodeError("implausible sample rate", f"{file.samplerate} Hz")
        if not 1 <= file.channels <= MAX_CHANNELS:
            raise DecodeError("implausible channel count", str(file.channels))
        yield file


def _container(data: bytes) -> str:
    """Returns the container, by its first bytes.

    Raises:
        DecodeError: it is not one that can be decoded. libsndfile would also try formats of the nineties whose
            headers random bytes resemble.
    """
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    for offset, signature, name in _FOREIGN_SIGNATURES:
        if data.startswith(signature, offset):
            raise DecodeError("unsupported format", name)
    if data[0] == 0xFF and len(data) > 1 and data[1] & 0xE0 == 0xE0:  # an MPEG frame's eleven sync bits
        if data[1] & 0x06 == 0:
            raise DecodeError("unsupported format", "AAC in ADTS")
        return "mp3"
    raise DecodeError("not audio", f"begins with {data[:8]!r}")


def _blocks(file: soundfile.SoundFile, wanted: int) -> Iterator[np.ndarray]:
    """Yields at most `wanted` mono samples, block by block, and fails where the stream does."""
    got = 0
    # SoundFile.frames is the header's claim; it only ever makes the buffer smaller.
    most = max(1, min(_BLOCK_VALUES // file.channels, wanted, file.frames))
    while got < wanted:
        try:
            block = file.read(out=np.empty((min(most, wanted - got), file.channels), np.float32))
        except soundfile.SoundFileError as error:
            raise DecodeError("corrupt stream", f"after {got} samples: {_message(error)}") from error
        if not len(block):
            break
        mono = _mix(block)
        if not math.isfinite(_peak(mono)):
            raise DecodeError(
                "non-finite samples", f"{np.count_nonzero(~np.isfinite(mono))} of the first {got + len(mono)}"
            )
        got += len(mono)
        yield mono
    if got == 0:
        raise DecodeError("no samples")
    missing = min(file.frames, wanted) - got
    if missing > max(_MAX_MISSING * file.frames, 0.1 * file.samplerate):
        raise DecodeError("cut short", f"{got} of {file.frames} samples are there")


def _mix(block: np.ndarray) -> np.ndarray:
    """Mean of the channels: (samples, channels) → (samples,)."""
    if block.shape[1] == 1:
        return block[:, 0]
    mono = block[:, 0] + block[:, 1]
    for channel in range(2, block.shape[1]):  # several times faster than mean(axis=1) over so short an axis
        mono += block[:, channel]
    mono /= np.float32(block.shape[1])
    return mono


def _peak(samples: np.ndarray) -> float:
    """Largest magnitude; infinite or NaN where a sample is."""
    return max(float(samples.max()), -float(samples.min()))


def _extension(file: soundfile.SoundFile) -> str:
    known = {"WAVEX": "wav", "RF64": "wav", "OGG": "opus" if file.subtype == "OPUS" else "ogg"}
    return known.get(str(file.format), str(file.format).lower())


def _message(error: Exception) -> str:
    return getattr(error, "error_string", str(error))
