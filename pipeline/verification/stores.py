"""Reads a logit store again, every part from end to end, and moves aside what has to be made again."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.errors import LogitStoreError, StorageUnavailableError
from pipeline.logits.alignment import target_rows
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    FAILED_NAME,
    STORE_NAME,
    LogitPart,
    LogitStore,
    part_files,
    part_stem,
    read_part,
    read_stamp,
    write_failures,
    write_stamp,
)
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage
from pipeline.storage.files import LISTING_NAME, StoredFile
from pipeline.verification.faults import Advance, Fault, Findings, move_aside
from pipeline.verification.inspection import cover

BAD_STAMP, OTHER_STAMP = "unusable stamp", "part made otherwise"
DAMAGED_PART, NOT_FINITE, REPEATED_ID = "damaged part", "logits that are not finite", "repeated clip id"
OTHER_CLASSES, UNCOVERED, CHANGED_SHARD = "other classes", "clips without logits", "shard changed since"
STALE_FAILURES = "list of failed clips disagrees"

_TO_MAKE_AGAIN = (OTHER_STAMP, DAMAGED_PART, NOT_FINITE, REPEATED_ID)
"""Faults of a part that `pipeline teacher-logits` mends once the part is out of its way."""


def verify_store(
    location: str, manifest: Manifest | None, *, workers: int, on_parts: Callable[[int], None], advance: Advance
) -> Findings:
    """Read every part of a store: stamps, ids, shapes, numbers; and what it has for a dataset.

    Args:
        location: the folder, a path or a URL.
        manifest: of the dataset that the store should cover; None asks for no coverage.
        workers: parts read at the same time, at least 1.
        on_parts: told how many parts there are.
        advance: told of each part that is done.

    Raises:
        StorageUnavailableError: the server can't be reached.
        LostProcessError: reading a part stands still.
    """
    findings = Findings()
    stamp = _stamp(location, findings)
    files = part_files(location)
    on_parts(len(files))
    sound: list[LogitPart] = []
    with Threads(workers, "verify") as threads:
        for _, (part, faults) in threads.map(
            lambda file: _verify_part(location, file, stamp), files, name=lambda file: file.name
        ):
            findings.looked_at["parts"] += 1
            findings.looked_at["clips"] += part.clips if part else 0
            findings.faults.extend(faults)
            if part is not None and not faults:
                sound.append(part)
            advance(1)
    _verify_failures(location, files, sound, findings)
    if stamp is not None:
        _verify_coverage(LogitStore(location=location, stamp=stamp, parts=tuple(sound)), manifest, findings)
    return findings


def _stamp(location: str, findings: Findings) -> StoreStamp | None:
    try:
        stamp = read_stamp(location)
    except LogitStoreError as error:
        findings.faults.append(Fault(BAD_STAMP, STORE_NAME, detail=str(error)))
        return None
    if stamp is None:
        findings.faults.append(Fault(BAD_STAMP, STORE_NAME, detail="is not there"))
    return stamp


def _verify_part(location: str, file: StoredFile, stamp: StoreStamp | None) -> tuple[LogitPart | None, list[Fault]]:
    """Read one part; gives it where its footer can be read, and what is wrong with it."""
    try:
        part = read_part(location, file)
        faults = list(_content_faults(LogitStore(location=location, stamp=part.stamp, parts=(part,)), part))
    except StorageUnavailableError:
        raise
    except LogitStoreError as error:
        return None, [Fault(DAMAGED_PART, file.name, detail=str(error))]
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [Fault(DAMAGED_PART, file.name, detail=str(error).splitlines()[0])]
    if stamp is not None and part.stamp != stamp:
        faults.append(Fault(OTHER_STAMP, file.name, detail=part.stamp.differences_from(stamp)))
    return part, faults


def _content_faults(store: LogitStore, part: LogitPart) -> list[Fault]:
    ids = store.part_clip_ids(part).to_pylist()
    faults = [
        Fault(REPEATED_ID, part.file.name, clip_id, f"{count} times in one part")
        for clip_id, count in Counter(ids).items()
        if count > 1
    ]
    is_finite = np.isfinite(store.part_views(part)).all(axis=(1, 2))  # (clips,)
    if part.stamp.members is not None:
        members = np.isfinite(store.part_members(part)).all(axis=(0, 2))  # (rows,)
        is_finite &= members.reshape(len(ids), -1).all(axis=1)
    return faults + [Fault(NOT_FINITE, part.file.name, ids[row]) for row in np.flatnonzero(~is_finite)]


def _verify_failures(location: str, files: list[StoredFile], sound: list[LogitPart], findings: Findings) -> None:
    """Compare failed.parquet, where it is there, with the parts, which it only repeats."""
    failures = sum(len(part.failures) for part in sound)
    findings.notes["clips that the teachers could not be given"] += failures
    if len(sound) < len(files):
        return  # it will be written again with the parts
    path = storage.join_path(location, FAILED_NAME)
    try:
        if not storage.exists(path):
            return
        with storage.open_input(path) as stream:
            listed = pq.read_table(stream).num_rows
        if listed != failures:
            detail = f"lists {listed} clips, but the parts tell of {failures}"
            findings.faults.append(Fault(STALE_FAILURES, FAILED_NAME, detail=detail))
    except (pa.ArrowException, OSError) as error:
        findings.faults.append(Fault(STALE_FAILURES, FAILED_NAME, detail=str(error).splitlines()[0]))


def _verify_coverage(store: LogitStore, manifest: Manifest | None, findings: Findings) -> None:
    _, repeated = _repeats(store)
    if repeated:
        findings.notes["clips in several parts, of which the first counts"] += repeated
    if manifest is None:
        return
    try:
        coverage = cover(store, manifest)
    except LogitStoreError as error:
        findings.faults.append(Fault(OTHER_CLASSES, STORE_NAME, detail=str(error)))
        return
    failed = {failure.clip_id for part in store.parts for failure in part.failures}
    ids = manifest.clip_ids
    known = set(store.clip_ids().to_pylist()) | failed if coverage.uncovered_shards else set()
    for shard, count in coverage.uncovered_shards.items():
        rows = manifest.rows_of_shard(shard)
        missing = [clip_id for clip_id in ids.take(pa.array(rows)).to_pylist() if clip_id not in known]
        if missing:
            detail = f"{len(missing)} of {len(rows)}, such as {missing[0]}; {count - len(missing)} more failed"
            findings.faults.append(Fault(UNCOVERED, shard, detail=detail))
    _verify_sources(store, manifest, coverage.changed_shards, findings)


def _verify_sources(store: LogitStore, manifest: Manifest, changed: tuple[str, ...], findings: Findings) -> None:
    """Tell a shard whose sounds have changed from one that only shares its name with what a part was made from."""
    parts = {part.stem: part for part in store.parts}
    for shard in changed:
        part = parts[part_stem(shard)]
        ids = manifest.clip_ids.take(pa.array(manifest.rows_of_shard(shard))).to_pylist()
        made_from = {*store.part_clip_ids(part).to_pylist(), *(failure.clip_id for failure in part.failures)}
        if set(ids) == made_from:
            detail = f"{part.file.name} was made from other bytes, or the clips in another order"
            findings.faults.append(Fault(CHANGED_SHARD, shard, detail=detail))
        else:
            findings.notes["shards that are cut otherwise than the store's parts"] += 1


def _repeats(store: LogitStore) -> tuple[np.ndarray, int]:
    ids = store.clip_ids()
    return target_rows(ids, ids.combine_chunks().unique())


def repair_store(location: str, findings: Findings) -> None:
    """Move bad parts into `.damaged`, so that `pipeline teacher-logits` makes them again; write lists anew.

    A stamp that can't be read is written again where all sound parts bear the same one.
    """
    for name in dict.fromkeys(fault.file for fault in findings.faults if fault.check in _TO_MAKE_AGAIN):
        target = move_aside(location, name)
        for fault in findings.faults:
            if fault.file == name:
                fault.repair = f"moved to {target}; `pipeline teacher-logits` makes it again"
    parts = [read_part(location, file) for file in part_files(location)]
    stamps = {part.stamp.to_json() for part in parts}
    for fault in findings.faults:
        if fault.check == BAD_STAMP and len(stamps) == 1:
            if storage.exists(storage.join_path(location, STORE_NAME)):
                move_aside(location, STORE_NAME)
            write_stamp(location, parts[0].stamp)
            fault.repair = f"written again from the {len(parts)} parts, which agree"
        elif fault.check == STALE_FAILURES:
            write_failures(location, parts)
            fault.repair = "written again from the parts"
    if storage.exists(storage.join_path(location, LISTING_NAME)) and any(fault.repair for fault in findings.faults):
        storage.write_listing(location)
