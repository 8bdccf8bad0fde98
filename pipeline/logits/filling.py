"""How a store is filled shard by shard, whoever computes the logits: claimed, gone on with, never mixed."""

from collections import Counter

from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.logits.part_ranges import remove_ranges
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    FAILED_NAME,
    LogitPart,
    finished_parts,
    other_parts,
    part_stem,
    read_stamp,
    write_stamp,
)
from pipeline.storage import files as storage


def check_part_names(manifest: Manifest) -> None:
    """Refuse shards whose parts would overwrite each other or the list of failures.

    Raises:
        UsageError: there are such.
    """
    stems = Counter(map(part_stem, manifest.shards)) + Counter([FAILED_NAME.removesuffix(".parquet")])
    if repeated := [shard for shard in manifest.shards if stems[part_stem(shard)] > 1]:
        raise UsageError(
            f"{manifest.location}: {', '.join(repeated[:3])} would share the name of a part in the store. "
            f"Rename them so that their names without folder differ, then run `pipeline index {manifest.location}`."
        )


def check_claim(store: str, stamp: StoreStamp, *, overwrite: bool) -> list[LogitPart]:
    """Refuse a store that is not ours to fill; give the parts that have to go, where it may be replaced.

    Raises:
        UsageError: another stamp made it, and it may not be replaced.
        StorageError: nothing can be written there.
    """
    storage.check_writable(store)
    found = read_stamp(store)
    if found == stamp:
        return []
    others = other_parts(store, stamp)
    made_by = found or (others[0].stamp if others else None)
    if made_by is not None and not overwrite:
        raise UsageError(
            f"{store}: was made otherwise ({made_by.differences_from(stamp)}). Give another --store, the settings "
            "that it was made with, or --overwrite to replace it."
        )
    return others


def claim_store(store: str, stamp: StoreStamp, *, overwrite: bool) -> None:
    """Make the store ours: new, made alike, or emptied of what was made otherwise.

    Raises:
        UsageError: another stamp made it, and it may not be replaced.
        StorageError: nothing can be written there.
    """
    others = check_claim(store, stamp, overwrite=overwrite)
    for part in others:
        storage.remove(storage.join_path(store, part.file.name))
    if read_stamp(store) != stamp:
        remove_ranges(store)
        write_stamp(store, stamp)
    storage.remove_staged(store)


def finished_shards(store: str, stamp: StoreStamp, manifest: Manifest) -> dict[str, LogitPart]:
    """Find the shards whose part `stamp` made from the bytes that the manifest knows."""
    parts = finished_parts(store, stamp)
    by_shard = {shard: part for shard in manifest.shards if (part := parts.get(part_stem(shard)))}
    return {shard: part for shard, part in by_shard.items() if part.shard_identity == manifest.shard_identity(shard)}
