"""Packs planned clips into one shard: the part of every ingest that doesn't depend on where the clips come from."""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline import storage
from pipeline.audio import SoundFacts, inspect_sound
from pipeline.clips import Clip
from pipeline.errors import DecodeError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger, publish_ledger
from pipeline.ingest.plan import PlannedShard
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import ClipReader, PlannedClip, ReadHandle
from pipeline.shards import open_shard

Item = TypeVar("Item")
Result = TypeVar("Result")

Encoding = Callable[[bytes, SoundFacts], bytes]
"""Encodes a sound anew, or gives the very bytes that it got; raises DecodeError."""


@dataclass(frozen=True, slots=True)
class _Accepted:
    clip: PlannedClip
    facts: SoundFacts
    crc32: int


def pack_shard(
    dataset: str,
    shard: PlannedShard,
    read_clips: ClipReader,
    workers: int,
    encode: Encoding | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> None:
    """Make one shard: read and decode each of its clips, write those that are whole, publish tar and ledger.

    Args:
        dataset: the folder, a path or a URL.
        shard: what goes into it.
        read_clips: of the shard's source.
        workers: how many threads decode, and read where the source can be read in any order.
        encode: what to do with the bytes; None keeps them.
        on_clip: called after each clip.
    """
    accepted: list[_Accepted] = []
    rejections: list[Rejection] = []
    clips = shard.clips()
    handles = zip(clips, read_clips(clips), strict=True)
    with open_shard(dataset, shard.name) as writer:
        for (clip, _), (audio, found) in _ordered_map(lambda item: _prepare(item[1], encode), handles, workers):
            if isinstance(found, DecodeError):
                rejections.append(Rejection(clip.clip_id, clip.path, found.reason, found.detail))
            else:
                writer.write(Clip(clip_id=clip.clip_id, audio=audio, format=found.format), _facts(clip, found, shard))
                accepted.append(_Accepted(clip, found, zlib.crc32(audio)))
            on_clip()
    if not accepted:
        storage.remove(storage.join_path(dataset, shard.name))  # plain webdataset fails on a shard without clips
    ledger = Ledger(_rows(shard.name, accepted, writer.ranges), rejections)
    publish_ledger(dataset, shard.name, shard.fingerprint(), ledger)


def _prepare(handle: ReadHandle, encode: Encoding | None) -> tuple[bytes, SoundFacts | DecodeError]:
    """Read a clip, decode it to see that it can be, and encode it anew where that is wanted."""
    try:
        audio = handle()
        facts = inspect_sound(audio)
        if encode is not None and (encoded := encode(audio, facts)) is not audio:
            return encoded, inspect_sound(encoded)
        return audio, facts
    except DecodeError as error:
        return b"", error


def _ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Give (item, result) in the items' order, from threads that are a bounded number of items ahead."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            under_way.append((item, pool.submit(function, item)))
            if len(under_way) > 4 * workers:
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _facts(clip: PlannedClip, found: SoundFacts, shard: PlannedShard) -> dict[str, object]:
    """What the json beside the audio says: all that the manifest is made from, so that it can be made again."""
    known = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
    return {
        "labels": [shard.vocabulary.classes[label].mid for label in clip.labels],
        **{name: value for name, value in known.items() if value is not None},
        "sample_rate": found.sample_rate_hz,
        "frames": found.frames,
    }


def _rows(shard: str, accepted: Sequence[_Accepted], ranges: Sequence[tuple[int, int]]) -> pa.Table:
    rows = [
        {
            "clip_id": item.clip.clip_id,
            "shard": shard,
            "offset": offset,
            "size": size,
            "format": item.facts.format,
            "labels": item.clip.labels,
            "sample_rate": item.facts.sample_rate_hz,
            "frames": item.facts.frames,
            "start_seconds": item.clip.start_seconds,
            "end_seconds": item.clip.end_seconds,
            "crc32": item.crc32,
        }
        for item, (offset, size) in zip(accepted, ranges, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
