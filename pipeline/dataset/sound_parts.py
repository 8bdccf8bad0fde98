"""An encoded sound of any length → its mono waveform, part by part, in memory that does not grow with it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import soxr

from pipeline.dataset.audio import LOUDEST_PEAK, check_finite, mix_channels
from pipeline.dataset.mapped_sound import MappedSound
from pipeline.dataset.sound_reader import open_sound
from pipeline.storage import files as storage

PART_SECONDS = 30.0
"""No part is longer."""
WHOLE_SECONDS = 300.0
"""Of a sound up to this length all is known before the first part is given: one that can't be decoded to its end, or is
in other units than full scale, is treated as a whole."""
MAPPED_BYTES = 32 << 20
"""Larger files are read where they lie."""


@contextmanager
def open_encoded(location: str) -> Iterator[bytes]:
    """Yields a file's bytes; a large one stays on the disk, and one behind a URL is fetched to it.

    Raises:
        PipelineError: the file is not there, or can't be read.
    """
    if storage.is_remote(location):
        with storage.local_copy(location) as path, _open_local(path) as data:
            yield data
        return
    with _open_local(storage.local_path(location)) as data:
        yield data


@contextmanager
def _open_local(path: Path) -> Iterator[bytes]:
    if not path.is_file() or path.stat().st_size <= MAPPED_BYTES:
        yield storage.read_bytes(path)
        return
    yield cast("bytes", MappedSound(path))  # all that the readers of formats do with bytes


def mono_parts(data: bytes, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields a sound's mono waveform at a rate, (samples,) float32 each, at most `PART_SECONDS` long.

    Raises:
        DecodeError: it is no sound that can be read, or damaged; a sound up to `WHOLE_SECONDS` gives no part then.
    """
    with open_sound(data) as sound:
        blocks = _begun(map(mix_channels, sound.blocks), round(WHOLE_SECONDS * sound.sample_rate_hz))
        yield from resampled_parts(blocks, sound.sample_rate_hz, sample_rate_hz)


def resampled_parts(blocks: Iterable[np.ndarray], from_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """Yields mono blocks, (samples,) float32, at another rate, in parts; what is beyond `LOUDEST_PEAK` is scaled down.

    Raises:
        DecodeError: a sample is no number.
    """
    resampler = None if from_hz == to_hz else soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")
    most, got, peak = round(PART_SECONDS * from_hz), 0, 0.0
    for block in blocks:
        peak = max(peak, check_finite(block, got))
        got += len(block)
        scaled = block / np.float32(peak) if peak > LOUDEST_PEAK else block
        for start in range(0, len(scaled), most):
            part = scaled[start : start + most]
            if len(part := part if resampler is None else resampler.resample_chunk(part)):
                yield part
    if resampler is not None and len(rest := resampler.resample_chunk(np.empty(0, np.float32), last=True)):
        yield rest


def _begun(blocks: Iterator[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """Yields the first `samples` in one piece, and the blocks behind them as they come."""
    first: list[np.ndarray] = []
    for block in blocks:
        first.append(block)
        if sum(map(len, first)) > samples:
            break
    if first:
        yield first[0] if len(first) == 1 else np.concatenate(first)
    yield from blocks
