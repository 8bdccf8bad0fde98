"""Packs planned clips into one shard: the part of every ingest that doesn't depend on where the clips come from."""

import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline.dataset.audio import SoundFacts, inspect_sound
from pipeline.dataset.clips import Clip
from pipeline.dataset.shards import ShardWriter, open_shard
from pipeline.errors import DecodeError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger, publish_ledger
from pipeline.ingest.plan import PlannedShard
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import ClipReader, KnownSound, PlannedClip, ReadHandle, facts_to_tell
from pipeline.storage import files as storage

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGER_THAN_SEGMENT = "sounds longer than their segment, as of whole videos; models hear their beginning"
_SPARE_SECONDS = 1.0
"""What a cutter may leave around a segment."""

Encoding = Callable[[bytes, SoundFacts], bytes]
"""Encodes a sound anew, or gives the very bytes that it got; raises DecodeError."""


@dataclass(frozen=True, slots=True)
class _Sound:
    """What of a clip is not in its plan."""

    audio: bytes
    format: str
    sample_rate_hz: int | None
    frames: int | None
    description: bytes = b""
    """The json as it is to be; empty where it is still to be made."""
    notes: tuple[str, ...] = ()
    """What is worth a word."""


def pack_shard(
    dataset: str,
    shard: PlannedShard,
    read_clips: ClipReader,
    workers: int,
    encode: Encoding | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> None:
    """Make one shard: read and decode each of its clips, write those that are whole, publish tar and ledger.

    A clip out of a finished dataset is not decoded, but copied.

    Args:
        dataset: the folder, a path or a URL.
        shard: what goes into it.
        read_clips: of the shard's source.
        workers: how many threads decode, and read where the source can be read in any order.
        encode: what to do with the bytes; None keeps them.
        on_clip: called after each clip.
    """
    rows: list[dict[str, object]] = []
    rejections: list[Rejection] = []
    notes: Counter[str] = Counter()
    clips = shard.clips()
    handles = zip(clips, read_clips(clips), strict=True)
    with open_shard(dataset, shard.name) as writer:
        for (clip, _), found in _ordered_map(lambda item: _prepare(*item, encode), handles, workers):
            if isinstance(found, DecodeError):
                rejections.append(Rejection(clip.clip_id, clip.path, found.reason, found.detail))
            else:
                _write(writer, clip, found, shard)
                rows.append(_row(shard.name, clip, found))
                notes.update(found.notes)
            on_clip()
    for row, (offset, size) in zip(rows, writer.ranges, strict=True):
        row |= {"offset": offset, "size": size}
    if not rows:
        storage.remove(storage.join_path(dataset, shard.name))  # plain webdataset fails on a shard without clips
    ledger = Ledger(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), rejections, notes)
    publish_ledger(dataset, shard.name, shard.fingerprint(), ledger)


def _prepare(clip: PlannedClip, handle: ReadHandle, encode: Encoding | None) -> _Sound | DecodeError:
    """Read a clip, decode it to see that it can be, and encode it anew where that is wanted."""
    try:
        read = handle()
        if isinstance(read, KnownSound):
            return _Sound(read.audio, clip.format, clip.sample_rate, clip.frames, read.description)
        audio, facts = read, inspect_sound(read)
        if encode is not None and (encoded := encode(audio, facts)) is not audio:
            audio, facts = encoded, inspect_sound(encoded)
        notes = (*facts.notes, *_notes(clip, facts))
        return _Sound(audio, facts.format, facts.sample_rate_hz, facts.frames, notes=notes)
    except DecodeError as error:
        return error


def _notes(clip: PlannedClip, facts: SoundFacts) -> tuple[str, ...]:
    if clip.start_seconds is None or clip.end_seconds is None:
        return ()
    excess = facts.frames / facts.sample_rate_hz - (clip.end_seconds - clip.start_seconds)
    return (LONGER_THAN_SEGMENT,) if excess > _SPARE_SECONDS else ()


def _ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, result) in the items' order, from threads that are a bounded number of items ahead."""
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


def _write(writer: ShardWriter, clip: PlannedClip, sound: _Sound, shard: PlannedShard) -> None:
    written = Clip(clip_id=clip.clip_id, audio=sound.audio, format=sound.format)
    if sound.description:
        writer.write_described(written, sound.description)
    else:
        writer.write(written, facts_to_tell(clip, shard.vocabulary, sound.sample_rate_hz, sound.frames))


def _row(shard: str, clip: PlannedClip, sound: _Sound) -> dict[str, object]:
    """Returns the manifest's columns of one clip, but for its place."""
    return {
        "clip_id": clip.clip_id,
        "shard": shard,
        "format": sound.format,
        "labels": clip.labels,
        "sample_rate": sound.sample_rate_hz,
        "frames": sound.frames,
        "start_seconds": clip.start_seconds,
        "end_seconds": clip.end_seconds,
        "crc32": zlib.crc32(sound.audio),
        "label_mask": clip.label_mask,
    }
