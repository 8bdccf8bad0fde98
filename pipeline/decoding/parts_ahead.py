"""Sounds of any length → parts of their waveforms, in order, decoded ahead of whoever asks for them.

Each process has every n-th sound and keeps its place in it, so that it holds one part and sends the next ones; which
parts come next does not depend on how many processes there are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.dataset.sound_parts import PART_SECONDS, mono_parts
from pipeline.dataset.sound_sources import Sounds
from pipeline.decoding.pool import DecodingPool, RequestQueue
from pipeline.decoding.shared_memory import Arena
from pipeline.errors import PipelineError

_PARTS_AHEAD = 3
"""Of each process: one in the making, one made, one that is looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundPart:
    """A part of a sound, or its end."""

    sound: int
    """Its number."""
    samples: np.ndarray
    """(samples,) float32; none at the end."""
    is_end: bool = False
    failure: str = ""
    """Why the sound can't be decoded, or not any further."""


class PartReader:
    """Decodes some of the sounds, one after the other.

    Args:
        sounds: all of them.
        first: the first that this one decodes.
        step: how many numbers further the next one is.
        sample_rate_hz: of the waveforms.
    """

    def __init__(self, sounds: Sounds, *, first: int, step: int, sample_rate_hz: int) -> None:
        self._sounds, self._rate = sounds, sample_rate_hz
        self._numbers = range(first, len(sounds), step)
        self._parts: Iterator[SoundPart] | None = None

    def load(self, request: Any, arena: Arena, at: Callable[[int], None]) -> SoundPart | None:
        """Returns the next part, None behind the last."""
        if self._parts is None:
            self._parts = self._all_parts()
        part = next(self._parts, None)
        if part is not None:
            at(part.sound)
        return part

    def result_bytes(self, request: Any) -> int:
        """Returns how much memory a part takes."""
        return 4 * round(PART_SECONDS * self._rate) + 4096

    def name_of(self, row: int) -> str:
        """Returns what a sound is called."""
        return self._sounds.name(row)

    def _all_parts(self) -> Iterator[SoundPart]:
        for number in self._numbers:
            failure = ""
            try:
                with self._sounds.open(number) as data:
                    for samples in mono_parts(data, self._rate):
                        yield SoundPart(sound=number, samples=samples)
            except (PipelineError, OSError) as error:
                failure = str(error)
            yield SoundPart(sound=number, samples=np.empty(0, np.float32), is_end=True, failure=failure)


def parts_ahead(sounds: Sounds, *, sample_rate_hz: int, processes: int) -> Iterator[SoundPart]:
    """Yields the parts of each sound in turn, and the end of each.

    Args:
        sounds: what to decode.
        sample_rate_hz: of the waveforms.
        processes: how many decode ahead; with 0 a part is decoded when it is asked for.

    Raises:
        LostProcessError: a process died or does not answer.
    """
    if processes == 0:
        reader = PartReader(sounds, first=0, step=1, sample_rate_hz=sample_rate_hz)
        while (part := reader.load(None, Arena(), lambda row: None)) is not None:
            yield part
        return
    with ExitStack() as stack:
        streams = []
        for first in range(processes):
            pool = stack.enter_context(DecodingPool(1))
            reader = PartReader(sounds, first=first, step=processes, sample_rate_hz=sample_rate_hz)
            streams.append(_PartStream(pool.open_queue(reader, _PARTS_AHEAD, reader.result_bytes(None), held=1)))
        for number in range(len(sounds)):
            is_end = False
            while not is_end:
                part = streams[number % processes].take()
                is_end = part.is_end
                yield part
                del part  # or its memory could not take the next one


class _PartStream:
    """What one process decodes, some parts of it ahead."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._orders = deque(queue.put(None) for _ in range(_PARTS_AHEAD))

    def take(self) -> SoundPart:
        order = self._orders.popleft()
        assert order is not None, "there is room for as many parts as are ever under way"
        part = order.result()
        self._orders.append(self._queue.put(None))
        return part
