"""Logit stores whose numbers a test chose, laid out as stage 1 leaves them: one part a shard."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.logits.stamp import StoreStamp, TeacherStamp
from pipeline.logits.store import ClipFailure, LogitStore, open_store, part_stem, publish_part, write_stamp


def stamp_for(manifest: Manifest, *teachers: str) -> StoreStamp:
    """Returns the stamp of a store for a dataset's classes, by teachers of equal weight that exist in name only."""
    return StoreStamp(
        teachers=tuple(
            TeacherStamp(name=name, weight=1.0, sha256="a" * 64, front_end="mel") for name in teachers or ("by hand",)
        ),
        vocabulary_sha256=manifest.vocabulary.sha256,
        classes=len(manifest.vocabulary),
        precision="float32",
    )


def fill_store(
    folder: str | Path,
    manifest: Manifest,
    logits: np.ndarray,
    *,
    stamp: StoreStamp | None = None,
    shards: Collection[str] | None = None,
    failed: Mapping[str, str] | None = None,
    absent: Collection[str] = (),
) -> LogitStore:
    """Publish a dataset's logits.

    Args:
        folder: the store's.
        manifest: the dataset's.
        logits: (clips, classes), or (clips, views, classes) for a stamp with views, by the manifest's rows.
        stamp: the store's; `stamp_for` the dataset unless given.
        shards: those that the store has parts of; all unless given.
        failed: clip id → why it has no logits.
        absent: ids that the store doesn't know.
    """
    stamp, failed = stamp or stamp_for(manifest), failed or {}
    write_stamp(str(folder), stamp)
    for shard in manifest.shards if shards is None else shards:
        rows = manifest.rows_of_shard(shard)
        ids = dict(zip(rows.tolist(), manifest.clip_ids.take(rows).to_pylist(), strict=True))
        kept = [row for row, clip_id in ids.items() if clip_id not in failed and clip_id not in absent]
        failures = [ClipFailure(clip_id=one, reason=failed[one]) for one in ids.values() if one in failed]
        names = [ids[row] for row in kept]
        of_views = logits[kept].reshape(-1, stamp.classes)  # (clips x views, classes)
        publish_part(str(folder), part_stem(shard), names, of_views, stamp, manifest.shard_identity(shard), failures)
    return open_store(str(folder))
