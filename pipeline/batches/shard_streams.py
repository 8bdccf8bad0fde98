"""Shards read from their start to their end, for stores where every seek is dear: what decoding processes do of it.

Like `pipeline.batches.reading` it imports neither torch nor Arrow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pipeline.batches.reading import BatchReader, ReadBatch, ViewedRows
from pipeline.dataset.clip_table import ClipTable
from pipeline.dataset.shards import check_clip_bytes
from pipeline.decoding.shared_memory import Arena
from pipeline.errors import PipelineError, ShardError, StorageUnavailableError
from pipeline.storage import files as storage

_REQUEST_BYTES = 8 << 20

Found = tuple[int, bytes | PipelineError]
"""A row with its encoded audio, or with the reason why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamRequest:
    """What a decoding process is asked for: one process's part of one step."""

    reader: int
    """Which of the process's readers it comes from."""
    rows: np.ndarray
    """(batch,), int64: rows in the manifest."""
    coming: np.ndarray | None = None
    """(clips,), int64, with a reader's first request in an epoch: all that it will be asked for in that epoch, in the
    order in which they lie."""
    wanted: np.ndarray | ViewedRows | None = None
    """The same rows, with the view that each clip is shown in where it has several; None is the clips as they are."""


class StreamReader:
    """Reads batches out of shards that it goes through once an epoch.

    Args:
        batches: decodes and joins; what a batch holds of a clip does not depend on how its bytes were read.
    """

    def __init__(self, batches: BatchReader) -> None:
        self._batches = batches
        self._streams: dict[int, _Stream] = {}

    def load(self, request: StreamRequest, arena: Arena, at: Callable[[int], None]) -> ReadBatch:
        """Read on until all clips of a request are there."""
        if request.coming is not None:
            self._streams[request.reader] = _Stream(self._batches.clips, request.coming)
        found = self._streams[request.reader].take(request.rows, at)

        def read(row: int) -> bytes:
            audio = found.pop(row)
            if isinstance(audio, PipelineError):
                raise audio
            return audio

        return self._batches.join(request.rows if request.wanted is None else request.wanted, read, arena, at)

    def result_bytes(self, request: StreamRequest) -> int:
        """Returns how much memory the arrays of a batch take."""
        return self._batches.result_bytes(request.rows)

    def name_of(self, row: int) -> str:
        """Returns a clip's id."""
        return self._batches.name_of(row)


class _Stream:
    """Reads one clip after the other and keeps those that are not due yet."""

    def __init__(self, clips: ClipTable, coming: np.ndarray) -> None:
        self._source = _read_in_turn(clips, coming)
        self._held: dict[int, bytes | PipelineError] = {}

    def take(self, rows: np.ndarray, at: Callable[[int], None]) -> dict[int, bytes | PipelineError]:
        missing = set(rows.tolist()) - self._held.keys()
        while missing:
            row, found = next(self._source)
            at(row)
            self._held[row] = found
            missing.discard(row)
        return {row: self._held.pop(row) for row in rows.tolist()}


def _read_in_turn(clips: ClipTable, rows: np.ndarray) -> Iterator[Found]:
    for shard, of_shard in groupby(rows.tolist(), key=clips.shard_of_clip.__getitem__):
        yield from stream_shard(clips, clips.shards[shard], list(of_shard))


def stream_shard(clips: ClipTable, shard: str, rows: list[int]) -> Iterator[Found]:
    """Read a shard up to the last of some clips, passing over the others.

    Args:
        clips: the dataset's.
        shard: the tar's name in it.
        rows: rows of that shard, in the order in which they lie.
    """
    done = 0
    try:
        with storage.open_input(storage.join_path(clips.location, shard), request_bytes=_REQUEST_BYTES) as stream:
            for row in rows:
                stream.seek(int(clips.offsets[row]))
                audio = stream.read(int(clips.sizes[row]))
                done += 1
                yield row, _checked(clips, row, audio)
        return
    except StorageUnavailableError as error:
        fault: PipelineError = error  # no fault of the clips'
    except (PipelineError, OSError) as error:
        fault = ShardError(f"{clips.location}: can't read {shard} ({error})")
    for row in rows[done:]:
        yield row, fault


def _checked(clips: ClipTable, row: int, audio: bytes) -> bytes | PipelineError:
    try:
        check_clip_bytes(clips, row, audio)
    except ShardError as error:
        return error
    return audio
