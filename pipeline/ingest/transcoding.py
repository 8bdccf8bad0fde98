"""Encodes sounds anew: FLAC or Opus, at their own sample rate or another, block by block."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
import soxr

from pipeline.dataset.audio import SoundFacts
from pipeline.dataset.ogg import with_serial_number
from pipeline.dataset.sound_reader import SoundReader, open_sound
from pipeline.errors import DecodeError

OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)
"""The codec knows no others: RFC 6716, section 2."""
HIGHEST_FLAC_RATE_HZ = 655_350
_MAX_CHANNELS = {"flac": 8, "opus": 2}
_OPUS_BITS_PER_SECOND = 64_000
"""Of each channel, on average."""
_MIN_OPUS_RATE, _MAX_OPUS_RATE = 6_000, 256_000
"""Bits a second that libsndfile's compression levels 1 and 0 mean; the others lie evenly between them."""
_BLOCK_FRAMES = 2**20


@dataclass(frozen=True, slots=True)
class Transcoding:
    """What every sound becomes; one that is so already keeps its bytes. Channels stay as they are."""

    format: Literal["flac", "opus"]
    sample_rate_hz: int | None = None
    """None keeps each sound's own rate; for Opus, the next rate that it knows."""

    def __call__(self, audio: bytes, facts: SoundFacts) -> bytes:
        """Encode one sound that `inspect_sound` has read to its end.

        FLAC gets the 16 bits of a sound that has no more, else 24; what is beyond full scale, as lossy codecs
        overshoot, is cut there. Equal sounds give equal bytes, of one version of the codecs.

        Raises:
            DecodeError: the format can't hold it.
        """
        rate = self.rate_for(facts.sample_rate_hz)
        if (facts.format, facts.sample_rate_hz) == (self.format, rate):
            return audio
        if facts.channels > _MAX_CHANNELS[self.format]:
            raise DecodeError(
                "too many channels", f"{facts.channels}; {self.format} takes {_MAX_CHANNELS[self.format]}"
            )
        try:
            return self._encode(audio, rate)
        except soundfile.SoundFileError as error:
            raise DecodeError("can't be encoded", str(error)) from error

    def rate_for(self, own_rate_hz: int) -> int:
        """Returns the rate that a sound of some rate gets, in Hz."""
        if self.sample_rate_hz is not None:
            return self.sample_rate_hz
        if self.format == "flac":
            return min(own_rate_hz, HIGHEST_FLAC_RATE_HZ)
        return next((rate for rate in OPUS_RATES_HZ if rate >= own_rate_hz), OPUS_RATES_HZ[-1])

    def _encode(self, audio: bytes, rate: int) -> bytes:
        with open_sound(audio) as source:
            encoded = io.BytesIO()
            with self._open_target(encoded, rate, source.channels, source.bits) as target:
                for block in _resampled(source, rate):
                    target.write(block if self.format == "opus" else quantise(block, source.bits))
        data = encoded.getvalue()
        return with_serial_number(data, 0) if self.format == "opus" else data

    def _open_target(self, stream: io.BytesIO, rate: int, channels: int, bits: int) -> soundfile.SoundFile:
        if self.format == "flac":
            return soundfile.SoundFile(stream, "w", rate, channels, f"PCM_{bits}", format="FLAC")
        level = (_MAX_OPUS_RATE - _OPUS_BITS_PER_SECOND) / (_MAX_OPUS_RATE - _MIN_OPUS_RATE)
        return soundfile.SoundFile(stream, "w", rate, channels, "OPUS", format="OGG", compression_level=level)


def quantise(samples: np.ndarray, bits: Literal[16, 24]) -> np.ndarray:
    """Turn float samples, full scale -1 to 1, into integers as soundfile takes them: int16, or int32 for 24 bits.

    What was read from integers of no more bits comes back as it was; soundfile's own scale would be off by one step.
    """
    steps = 2 ** (bits - 1)
    whole = np.rint(samples * np.float64(steps)).clip(-steps, steps - 1)
    return whole.astype(np.int16) if bits == 16 else whole.astype(np.int32) << 8


def _resampled(source: SoundReader, rate: int) -> Iterator[np.ndarray]:
    """Give a sound's blocks at a rate: (samples, channels), float32."""
    blocks = map(np.ascontiguousarray, _equally_wide(source))
    if rate == source.sample_rate_hz:
        yield from blocks
        return
    stream = soxr.ResampleStream(source.sample_rate_hz, rate, source.channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty((0, source.channels), np.float32), last=True)


def _equally_wide(source: SoundReader) -> Iterator[np.ndarray]:
    for block in source.blocks:
        if block.shape[1] != source.channels:
            raise DecodeError("several channel counts", f"{source.channels} and {block.shape[1]}; one file has one")
        yield block
