"""A stream of samples that comes as it is played, raw or as WAV → mono blocks, as they come."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile

from pipeline.dataset.audio import mix_channels
from pipeline.dataset.sound_chunks import is_chunk_name, parse_wave_header, sample_bytes
from pipeline.dataset.sound_decoders import RawPcm
from pipeline.errors import DecodeError

SampleFormat = Literal["u8", "s8", "s16le", "s16be", "s24le", "s24be", "s32le", "s32be", "f32le", "f32be"]
_SUBTYPES = {"u8": "PCM_U8", "s8": "PCM_S8", "s16": "PCM_16", "s24": "PCM_24", "s32": "PCM_32", "f32": "FLOAT"}
_READ_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 20
_UNKNOWN_BYTES = 0x7FFF0000
"""Recorders that can't know how long they will record claim this much or more."""
_NAME_BYTES = 8
"""So much tells a chunk behind the samples from more of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawFormat:
    """What a stream without a header is."""

    sample_rate_hz: int
    channels: int = 1
    sample_format: SampleFormat = "s16le"


class LiveSound:
    """Samples that come through a pipe.

    Args:
        descriptor: where they come from; reading waits until some are there.
        raw: what they are; None for a stream that begins with a WAV header.

    Raises:
        DecodeError: it begins otherwise, or ends within its header.
    """

    def __init__(self, descriptor: int, raw: RawFormat | None) -> None:
        self._read: Callable[[], bytes] = lambda: os.read(descriptor, _READ_BYTES)
        if raw is None:
            self._pcm, self._promised, self._waiting = self._read_header()
        else:
            self._pcm, self._promised, self._waiting = _raw_pcm(raw), 0, b""
        self.sample_rate_hz = self._pcm.sample_rate_hz

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields (samples,) float32, mono, as they come, until the stream ends.

        Raises:
            DecodeError: it ends before the first of them.
        """
        is_empty = True
        for block in self._blocks():
            yield block
            is_empty = False
        if is_empty:
            raise DecodeError("empty stream")

    def _blocks(self) -> Iterator[np.ndarray]:
        frame_bytes = self._pcm.channels * sample_bytes(self._pcm.subtype)
        is_known = 0 < self._promised < _UNKNOWN_BYTES
        left = self._promised // frame_bytes * frame_bytes if is_known else None
        waiting, is_open = self._waiting, True
        while is_open or (left == 0 and waiting):
            if left == 0:  # what follows is a chunk, or the header was wrong
                while len(waiting) < _NAME_BYTES and (more := self._read()):
                    waiting += more
                if len(waiting) < _NAME_BYTES or is_chunk_name(waiting) or is_chunk_name(waiting[1:]):
                    return
                left = None
            usable = len(waiting) if left is None else min(len(waiting), left)
            usable -= usable % frame_bytes
            if usable:
                yield mix_channels(self._decode(waiting[:usable]))
                waiting, left = waiting[usable:], None if left is None else left - usable
            else:
                more = self._read()
                waiting, is_open = waiting + more, bool(more)

    def _decode(self, content: bytes) -> np.ndarray:
        pcm = self._pcm
        samples, _ = soundfile.read(
            io.BytesIO(content),
            dtype="float32",
            always_2d=True,
            samplerate=pcm.sample_rate_hz,
            channels=pcm.channels,
            format="RAW",
            subtype=pcm.subtype,
            endian=pcm.endian,
        )
        return samples

    def _read_header(self) -> tuple[RawPcm, int, bytes]:
        """Returns what the samples are, how many bytes of them are promised, and the first ones."""
        head = b""
        while True:
            more = self._read()
            head += more
            if not head:
                raise DecodeError("empty stream")
            if len(head) >= 12 or not more:
                _check_is_wave(head)
                try:
                    pcm = parse_wave_header(head)
                except DecodeError:
                    if not more or len(head) > _MAX_HEADER_BYTES:
                        raise
                else:
                    return pcm, pcm.end - pcm.start, head[pcm.start :]


def _check_is_wave(head: bytes) -> None:
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:12] != b"WAVE":
        raise DecodeError(
            "not a WAV stream",
            f"it begins with {head[:8]!r}. Say what samples without a header are: --rate, --channels, --sample-format",
        )


def _raw_pcm(raw: RawFormat) -> RawPcm:
    name = raw.sample_format
    return RawPcm(
        subtype=_SUBTYPES[name.removesuffix("le").removesuffix("be")],
        endian="BIG" if name.endswith("be") else "LITTLE",
        sample_rate_hz=raw.sample_rate_hz,
        channels=raw.channels,
        start=0,
        end=0,
    )
