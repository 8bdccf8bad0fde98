"""What the loader is held against: the same clips decoded by as many of the same processes, and nothing else."""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import soundfile

from pipeline.dataset.audio import load_waveform
from pipeline.decoding.shared_memory import Arena

RATE_HZ, SECONDS = 32_000, 10.0


def decode_bare(data: bytes) -> None:
    """Do what everybody's data set does."""
    soundfile.read(io.BytesIO(data), dtype="float32")


def decode_and_resample(data: bytes) -> None:
    """Make the waveform that a model takes."""
    load_waveform(data, sample_rate_hz=RATE_HZ, seconds=SECONDS)


class BareReader:
    """Decodes clips that are in memory already; for a `DecodingPool`."""

    def __init__(self, work: Literal["bare", "resample"], clips: Sequence[bytes]) -> None:
        self._work = work
        self._bytes = np.frombuffer(b"".join(clips), np.uint8)
        self._ends = np.cumsum([len(clip) for clip in clips])

    def load(self, request: Sequence[int], arena: Arena, at: Callable[[int], None]) -> int:
        work = decode_bare if self._work == "bare" else decode_and_resample
        for row in request:
            at(row)
            start = self._ends[row - 1] if row else 0
            work(self._bytes[start : self._ends[row]].tobytes())
        return len(request)

    def result_bytes(self, request: Sequence[int]) -> int:
        return 1

    def name_of(self, row: int) -> str:
        return f"number {row}"
