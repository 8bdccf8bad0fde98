"""Packs planned clips into one shard: the part of every ingest that doesn't depend on where the clips come from."""

import zlib
from collections import Counter
from collections.abc import Callable

import pyarrow as pa

from pipeline.dataset.clips import Clip
from pipeline.dataset.shards import ShardWriter, open_shard
from pipeline.errors import DecodeError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger, publish_ledger
from pipeline.ingest.plan import PlannedShard
from pipeline.ingest.preparing import ClipPreparation, PreparedSound
from pipeline.ingest.rejections import Rejection
from pipeline.ingest.sources import ClipReader, PlannedClip, facts_to_tell
from pipeline.storage import files as storage


def pack_shard(
    dataset: str,
    shard: PlannedShard,
    read_clips: ClipReader,
    preparation: ClipPreparation,
    on_clip: Callable[[], None] = lambda: None,
) -> None:
    """Make one shard: read and decode each of its clips, write those that are whole, publish tar and ledger.

    A clip out of a finished dataset is not decoded, but copied.

    Args:
        dataset: the folder, a path or a URL.
        shard: what goes into it.
        read_clips: of the shard's source.
        preparation: reads and decodes.
        on_clip: called after each clip.

    Raises:
        LostProcessError: a process that decodes died or does not answer; the shard is not made.
    """
    rows: list[dict[str, object]] = []
    rejections: list[Rejection] = []
    notes: Counter[str] = Counter()
    clips = shard.clips()
    handles = zip(clips, read_clips(clips), strict=True)
    with open_shard(dataset, shard.name) as writer:
        for clip, found in preparation.prepare(shard.name, handles):
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


def _write(writer: ShardWriter, clip: PlannedClip, sound: PreparedSound, shard: PlannedShard) -> None:
    written = Clip(clip_id=clip.clip_id, audio=sound.audio, format=sound.format)
    if sound.description:
        writer.write_described(written, sound.description)
    else:
        writer.write(written, facts_to_tell(clip, shard.vocabulary, sound.sample_rate_hz, sound.frames))


def _row(shard: str, clip: PlannedClip, sound: PreparedSound) -> dict[str, object]:
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
