"""An encoded file → all its samples, block by block, whatever it is and whichever decoder reads it.

Nothing is allocated by what a header claims, and nothing is read beyond what is wanted.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.dataset.sound_decoders import Decoding, EncodedStream, checked_channels, checked_rate, several_rates
from pipeline.dataset.sound_formats import identify
from pipeline.errors import DecodeError


@dataclass(frozen=True, slots=True)
class SoundReader:
    """A file that is being read."""

    format: str
    """The extension that fits the content: wav, flac, mp3, aac, ogg, oga (FLAC in Ogg), opus, m4a, mp4 (with a video),
    webm, mka, mkv (with a video), aiff, w64, au, caf."""
    sample_rate_hz: int
    channels: int
    bits: Literal[16, 24]
    """How many are worth keeping."""
    has_video: bool
    claimed_samples: int | None
    """Of a channel, as headers promise; None where they don't. Nothing goes by it."""
    blocks: Iterator[np.ndarray]
    """(samples, channels), float32, full scale is -1 to 1. Streams that were joined follow one another, and need not
    have equally many channels. Raises DecodeError where the file is damaged, or turns out to have no samples."""


@contextmanager
def open_sound(data: bytes, max_seconds: float | None = None) -> Iterator[SoundReader]:
    """Begin to read a file.

    Args:
        data: an encoded file.
        max_seconds: how much is read at most; None is all.

    Raises:
        DecodeError: it is no sound that can be read.
    """
    sound = identify(data)
    if not sound.streams:
        raise DecodeError("no samples")
    first, *others = sound.streams
    claims = [stream.claimed for stream in sound.streams]
    with _open(first, max_seconds) as decoding:
        wanted = None if max_seconds is None else max(1, math.ceil(max_seconds * decoding.sample_rate_hz))
        yield SoundReader(
            format=sound.video_extension if decoding.has_video else sound.extension,
            sample_rate_hz=decoding.sample_rate_hz,
            channels=decoding.channels,
            bits=decoding.bits,
            has_video=decoding.has_video,
            claimed_samples=None if None in claims else sum(filter(None, claims)),
            blocks=_cut(_joined(decoding, others, max_seconds), wanted),
        )


@contextmanager
def _open(stream: EncodedStream, max_seconds: float | None) -> Iterator[Decoding]:
    with stream.open(max_seconds) as decoding:
        checked_rate(decoding.sample_rate_hz)
        checked_channels(decoding.channels)
        yield decoding


def _joined(first: Decoding, others: Sequence[EncodedStream], max_seconds: float | None) -> Iterator[np.ndarray]:
    yield from first.blocks
    for stream in others:
        with _open(stream, max_seconds) as decoding:
            if decoding.sample_rate_hz != first.sample_rate_hz:
                raise several_rates(first.sample_rate_hz, decoding.sample_rate_hz)
            yield from decoding.blocks


def _cut(blocks: Iterator[np.ndarray], wanted: int | None) -> Iterator[np.ndarray]:
    """Yields the first `wanted` samples; what the decoder does behind them is not waited for."""
    got = 0
    for block in blocks:
        left = len(block) if wanted is None else wanted - got
        got += len(block)
        yield block[:left]
        if wanted is not None and got >= wanted:
            return
    if not got:
        raise DecodeError("no samples")
