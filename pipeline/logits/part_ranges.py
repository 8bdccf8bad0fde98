"""Parts that are made in pieces: a stretch of a shard's clips at a time, joined when the last one is there.

Each piece is a file like a part, in `STORE/.ranges/`, where no reader of the store looks, and stays there until its
part is there, so that a run that was killed goes on with it. A part is the same, made in pieces or at once.
"""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.errors import LogitStoreError
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    ClipFailure,
    finished_parts,
    part_stem,
    publish_part,
    publish_part_table,
    read_part_table,
)
from pipeline.storage import files as storage

RANGES_NAME = ".ranges"
_STEM = re.compile(r"(.+)\.(\d+)-(\d+)")


def publish_range(
    store: str,
    shard_stem: str,
    start: int,
    stop: int,
    clip_ids: Sequence[str],
    logits: np.ndarray,
    stamp: StoreStamp,
    shard_identity: str,
    failures: Sequence[ClipFailure] = (),
    *,
    members: np.ndarray | None = None,
    device: str = "",
) -> None:
    """Write the logits of the clips from `start` to before `stop`; otherwise as `publish_part`."""
    publish_part(
        storage.join_path(store, RANGES_NAME),
        _range_stem(shard_stem, start, stop),
        clip_ids,
        logits,
        stamp,
        shard_identity,
        failures,
        members=members,
        device=device,
    )


def finished_ranges(store: str, stamp: StoreStamp, manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """Find the stretches, (start, stop), of each shard that `stamp` made from the bytes that the manifest knows."""
    shards = {part_stem(shard): shard for shard in manifest.shards}
    found: dict[str, list[tuple[int, int]]] = {}
    for stem, part in finished_parts(storage.join_path(store, RANGES_NAME), stamp).items():
        named = _STEM.fullmatch(stem)
        shard = shards.get(named[1]) if named else None
        if named is None or shard is None or part.shard_identity != manifest.shard_identity(shard):
            continue
        start, stop = int(named[2]), int(named[3])
        if part.clips + len(part.failures) == stop - start:
            found.setdefault(shard, []).append((start, stop))
    return found


def join_ranges(
    store: str, shard_stem: str, pieces: Sequence[tuple[int, int]], stamp: StoreStamp, shard_identity: str
) -> int:
    """Publish a part that is made of pieces, and remove them; returns how many of its clips failed.

    Args:
        store: the store's folder or URL.
        shard_stem: from `part_stem`.
        pieces: (start, stop) of each, in order, without a gap.
        stamp: what made them.
        shard_identity: of the shard.

    Raises:
        LogitStoreError: a piece is damaged, is not there, or was made from something else.
        StorageFullError: there is no room for the part.
    """
    folder, tables, failures, devices = storage.join_path(store, RANGES_NAME), [], [], []
    for start, stop in pieces:
        name = _range_stem(shard_stem, start, stop)
        part, table = read_part_table(folder, name)
        if (part.stamp, part.shard_identity) != (stamp, shard_identity):
            raise LogitStoreError(
                f"{storage.join_path(folder, name)}: made from something else. The same command makes it anew."
            )
        tables.append(table.replace_schema_metadata())
        failures.extend(part.failures)
        devices.extend(name for name in part.devices if name not in devices)
    publish_part_table(
        store, shard_stem, pa.concat_tables(tables), stamp, shard_identity, failures, device="; ".join(devices)
    )
    for start, stop in pieces:
        storage.remove(storage.join_path(folder, f"{_range_stem(shard_stem, start, stop)}.parquet"))
    return len(failures)


def remove_ranges(store: str) -> None:
    """Remove all pieces, of parts that are there by now, or that nobody wants any more."""
    folder = storage.join_path(store, RANGES_NAME)
    if storage.exists(folder):
        storage.remove(folder)


def _range_stem(shard_stem: str, start: int, stop: int) -> str:
    return f"{shard_stem}.{start:06}-{stop:06}"
