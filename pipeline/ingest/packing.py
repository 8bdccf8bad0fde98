"""Packs checked clips into shards: the part of every ingest that doesn't depend on where the clips come from.

The shard is the unit of work. Which clips go into which shard is decided before anything is read, so a shard can be
made alone, skipped when a stopped run has made it already, and has the same bytes for any number of workers.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import pyarrow as pa

from pipeline import storage
from pipeline.audio import SoundFacts, inspect_sound
from pipeline.clips import Clip
from pipeline.errors import DecodeError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger, publish_ledger
from pipeline.ingest.rejections import Rejection
from pipeline.shards import open_shard
from pipeline.vocabulary import Vocabulary

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PlannedClip:
    """A clip whose bytes are known to exist somewhere."""

    clip_id: str
    path: str
    """Where its bytes are, in the words of its source."""
    version: str
    """Changes when the bytes do, as far as can be told without reading them."""
    labels: tuple[int, ...]
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """The clips that one shard is made of."""

    name: str
    """Of the tar."""
    clips: Sequence[PlannedClip]
    vocabulary: Vocabulary

    def fingerprint(self) -> str:
        """Give a digest that changes when the shard would."""
        digest = sha256(f"{self.name} {self.vocabulary.sha256}".encode())
        for clip in self.clips:
            fields = (clip.clip_id, clip.path, clip.version, clip.labels, clip.start_seconds, clip.end_seconds)
            digest.update(repr(fields).encode())
        return digest.hexdigest()


def plan_shards(
    name: str, clips: Sequence[PlannedClip], clips_per_shard: int, vocabulary: Vocabulary
) -> list[PlannedShard]:
    """Cut a list of clips into shards called `<name>-000000.tar`, `<name>-000001.tar` and so on."""
    starts = range(0, len(clips), clips_per_shard)
    return [
        PlannedShard(f"{name}-{number:06d}.tar", clips[start : start + clips_per_shard], vocabulary)
        for number, start in enumerate(starts)
    ]


def pack_shard(
    dataset: str,
    shard: PlannedShard,
    read_audio: Callable[[PlannedClip], bytes],
    workers: int,
    on_clip: Callable[[], None] = lambda: None,
) -> Ledger:
    """Make one shard: read and decode each of its clips, write those that are whole, publish tar and ledger.

    Args:
        dataset: the folder, a path or a URL.
        shard: what goes into it.
        read_audio: gives a clip's bytes, or raises DecodeError.
        workers: how many threads read and decode.
        on_clip: called after each clip.
    """
    accepted: list[tuple[PlannedClip, SoundFacts, int]] = []
    rejections: list[Rejection] = []
    with open_shard(dataset, shard.name) as writer:
        for clip, (audio, found) in _ordered_map(lambda clip: _check(clip, read_audio), shard.clips, workers):
            if isinstance(found, DecodeError):
                rejections.append(Rejection(clip.clip_id, clip.path, found.reason, found.detail))
            else:
                writer.write(Clip(clip_id=clip.clip_id, audio=audio, format=found.format), _facts(clip, found, shard))
                accepted.append((clip, found, zlib.crc32(audio)))
            on_clip()
    if not accepted:
        storage.remove(storage.join_path(dataset, shard.name))  # plain webdataset fails on a shard without clips
    ledger = Ledger(_rows(shard.name, accepted, writer.ranges), rejections)
    publish_ledger(dataset, shard.name, shard.fingerprint(), ledger)
    return ledger


def _check(clip: PlannedClip, read_audio: Callable[[PlannedClip], bytes]) -> tuple[bytes, SoundFacts | DecodeError]:
    try:
        audio = read_audio(clip)
        return audio, inspect_sound(audio)
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


def _rows(
    shard: str, accepted: Sequence[tuple[PlannedClip, SoundFacts, int]], ranges: Sequence[tuple[int, int]]
) -> pa.Table:
    rows = [
        {
            "clip_id": clip.clip_id,
            "shard": shard,
            "offset": offset,
            "size": size,
            "format": found.format,
            "labels": clip.labels,
            "sample_rate": found.sample_rate_hz,
            "frames": found.frames,
            "start_seconds": clip.start_seconds,
            "end_seconds": clip.end_seconds,
            "crc32": checksum,
        }
        for (clip, found, checksum), (offset, size) in zip(accepted, ranges, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
