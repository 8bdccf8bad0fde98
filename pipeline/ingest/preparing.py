"""Planned clips → what is written of them: read in threads, decoded in processes, so that none can hold up the others.

Bytes that are only copied, out of finished datasets, never leave the threads: reading lets go of Python's lock, and
another process would only have them sent to and fro.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

from pipeline.decoding.pool import DecodingPool, Order, RequestQueue
from pipeline.errors import DecodeError
from pipeline.ingest.checking import CheckedSound, Encoding, SoundChecker
from pipeline.ingest.sources import KnownSound, PlannedClip, ReadHandle
from pipeline.runtime.threads import Threads
from pipeline.runtime.watching import PATIENCE_SECONDS

LONGER_THAN_SEGMENT = "sounds longer than their segment, as of whole videos; models hear their beginning"
_SPARE_SECONDS = 1.0
"""What a cutter may leave around a segment."""
_AHEAD = 2
"""Clips that each worker is given at once: one that it works on, and the next."""


@dataclass(frozen=True, slots=True)
class PreparedSound:
    """What of a clip is not in its plan."""

    audio: bytes
    format: str
    sample_rate_hz: int | None
    frames: int | None
    description: bytes = b""
    """The json as it is to be; empty where it is still to be made."""
    notes: tuple[str, ...] = ()
    """What is worth a word."""


class ClipPreparation:
    """Some threads, and as many processes once a sound has to be decoded, for as long as the `with` block lasts.

    Args:
        workers: how many.
        encode: what to do with the bytes; None keeps them.
        patience: how long one may be waited for without a sign of life, in seconds.
    """

    def __init__(self, workers: int, encode: Encoding | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
        self._workers, self._patience = workers, patience
        self._checker = SoundChecker(encode, {})
        self._numbers = count()
        self._queue: RequestQueue | None = None
        self._resources = ExitStack()
        self._threads = self._resources.enter_context(Threads(workers, "read clips", patience=patience))

    def prepare(
        self, shard: str, clips: Iterable[tuple[PlannedClip, ReadHandle]]
    ) -> Iterator[tuple[PlannedClip, PreparedSound | DecodeError]]:
        """Yields each clip, in their order, with what is to be written of it, or why it can't be used.

        Args:
            shard: which the clips are for, for messages.
            clips: asked for a bounded number ahead.

        Raises:
            LostProcessError: a process died or does not answer, or reading stands still.
        """
        under_way: deque[_UnderWay] = deque()
        ahead = _AHEAD * self._workers
        for (clip, _), read in self._threads.map(
            lambda item: _read(item[1]), clips, name=lambda item: f"{item[0].path} for {shard}", ahead=ahead
        ):
            under_way.append(self._begin(shard, clip, read))
            if len(under_way) > ahead:
                yield self._finish(under_way.popleft())
        while under_way:
            yield self._finish(under_way.popleft())

    def _begin(self, shard: str, clip: PlannedClip, read: bytes | KnownSound | DecodeError) -> "_UnderWay":
        if not isinstance(read, bytes):
            return _UnderWay(clip, read)
        if self._queue is None:
            pool = self._resources.enter_context(DecodingPool(self._workers, patience=self._patience))
            room = self._checker.result_bytes((0, read))
            self._queue = pool.open_queue(self._checker, _AHEAD * self._workers + 1, room, held=1)
        number = next(self._numbers)
        self._checker.names[number] = f"{clip.path} for {shard}"
        return _UnderWay(clip, read, number, self._queue.put((number, read)))

    def _finish(self, begun: "_UnderWay") -> tuple[PlannedClip, PreparedSound | DecodeError]:
        clip, read = begun.clip, begun.read
        if isinstance(read, KnownSound):
            return clip, PreparedSound(read.audio, clip.format, clip.sample_rate, clip.frames, read.description)
        if isinstance(read, DecodeError):
            return clip, read
        assert begun.order is not None, "there is room for as many clips as are ever under way"
        checked: CheckedSound | DecodeError = begun.order.result()
        # Also of a process that dies between two clips it is told where it was last.
        self._checker.names.pop(begun.number - 2 * _AHEAD * self._workers, None)
        if isinstance(checked, DecodeError):
            return clip, checked
        facts, audio = checked.facts, read if checked.encoded is None else checked.encoded
        notes = (*facts.notes, *_notes(clip, facts.frames / facts.sample_rate_hz))
        return clip, PreparedSound(audio, facts.format, facts.sample_rate_hz, facts.frames, notes=notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    clip: PlannedClip
    read: bytes | KnownSound | DecodeError
    number: int = -1
    order: Order | None = None


def _read(handle: ReadHandle) -> bytes | KnownSound | DecodeError:
    try:
        return handle()
    except DecodeError as error:
        return error


def _notes(clip: PlannedClip, seconds: float) -> tuple[str, ...]:
    if clip.start_seconds is None or clip.end_seconds is None:
        return ()
    return (LONGER_THAN_SEGMENT,) if seconds - (clip.end_seconds - clip.start_seconds) > _SPARE_SECONDS else ()
