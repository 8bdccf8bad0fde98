"""Makes a manifest again from the tars, keeping what the old one knew; no tar is touched."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import CLASSES_NAME, MANIFEST_NAME, VOCABULARY_KEY, with_present_names
from pipeline.dataset.row_tables import table_of_rows
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import ManifestError, PipelineError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, UNFINISHED, finish_folder
from pipeline.ingest.rejections import REJECTED_NAME, REJECTED_SCHEMA, Rejection, tabulate
from pipeline.ingest.tars import DAMAGED_SHARD, TarRules, index_tars, is_named_list, is_tar
from pipeline.storage import files as storage
from pipeline.verification.datasets import MISPLACED, MISSING_SHARD, UNUSABLE_MANIFEST
from pipeline.verification.faults import Fault, move_aside

_KEPT = ("labels", "sample_rate", "frames", "start_seconds", "end_seconds", "label_mask")
"""What the old manifest knows better than the tars."""

_MENDABLE = {UNUSABLE_MANIFEST, *MISPLACED}

Row = dict[str, Any]


def repair_dataset(location: str, faults: Iterable[Fault]) -> None:
    """Rebuild the manifest where that is what is wrong, and write into each fault that it mends what was done.

    A clip whose bytes have changed is never taken for right: the new manifest leaves it out. What the old manifest
    held and the new one lacks is listed in rejected.parquet; the old one itself moves to `.damaged`.

    Raises:
        PipelineError: the manifest is at fault, but can't be made again: shards are missing or damaged, the class list
            is missing or another one, or an ingest was stopped here.
    """
    mendable = [fault for fault in faults if fault.check in _MENDABLE]
    if not mendable:
        return
    _refuse_what_would_lose(location, faults)
    vocabulary = read_vocabulary(storage.join_path(location, CLASSES_NAME))
    known = _known_rows(location, vocabulary.sha256)
    shards = [file.name for file in storage.list_files(location) if is_tar(file.name)]
    shards += sorted({row["shard"] for row in known.values()} - set(shards))  # in folders below
    rules = TarRules(
        vocabulary=vocabulary,
        keep_unlabelled=bool(known),
        labels_known=bool(known),
        numbered=is_named_list(vocabulary),
    )
    ledger = index_tars(location, shards, rules)
    rejections = ledger.rejections
    if damaged := next((one for one in rejections if one.reason == DAMAGED_SHARD), None):
        raise PipelineError(f"{location}: {damaged.detail}. Put a sound copy back before the manifest is made again")
    rows, left_out = _united(ledger.rows.to_pylist(), known)
    if storage.exists(storage.join_path(location, MANIFEST_NAME)):
        move_aside(location, MANIFEST_NAME)
    rejected = _without_doubles([_rejected_before(location), tabulate([*rejections, *left_out])])
    finish_folder(location, [], [rejected], vocabulary, [pa.Table.from_pylist(rows, schema=ROW_SCHEMA)])
    for fault in mendable:
        fault.repair = "the manifest was made again from the tars"


def _refuse_what_would_lose(location: str, faults: Iterable[Fault]) -> None:
    for fault in faults:
        if fault.check in (MISSING_SHARD, DAMAGED_SHARD):
            raise PipelineError(
                f"{location}: {fault.check} {fault.file}, so a manifest made now would lack its clips. Put the shard "
                f"back, or run `pipeline index {location}` to go on without them"
            )
    if storage.exists(storage.join_path(location, UNFINISHED)):
        raise PipelineError(f"{location}: an ingest was stopped here. Run its command again; it makes the manifest")
    if not storage.exists(storage.join_path(location, CLASSES_NAME)):
        raise PipelineError(
            f"{location}: has no {CLASSES_NAME}, so nobody can say what its labels mean. Put it back, or run "
            f"`pipeline index {location} --classes CSV`"
        )


def _known_rows(location: str, vocabulary_sha256: str) -> dict[str, Row]:
    """Returns clip id → row of the old manifest; none where it can't be read at all.

    Raises:
        ManifestError: it was made for other classes: its labels would come to mean something else.
    """
    path = storage.join_path(location, MANIFEST_NAME)
    if not storage.exists(path):
        return {}
    try:
        with storage.open_input(path) as stream:
            table = with_present_names(pq.read_table(stream))
        made_for = (table.schema.metadata or {}).get(VOCABULARY_KEY, b"").decode(errors="replace")
        wanted = [field.name for field in ROW_SCHEMA if field.name in table.column_names]
        rows = table.select(wanted).cast(pa.schema([ROW_SCHEMA.field(name) for name in wanted])).to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return {}
    if made_for != vocabulary_sha256:
        raise ManifestError(
            f"{path}: made with classes {made_for[:12] or 'unknown'}, but {CLASSES_NAME} beside it hashes to "
            f"{vocabulary_sha256[:12]}. Put the right {CLASSES_NAME} back, or run `pipeline index {location}`"
        )
    if not {"clip_id", "shard", "labels"} <= set(wanted):
        return {}
    whole = [row for row in rows if row["clip_id"] and row["labels"] is not None and row["shard"]]
    return {row["clip_id"]: row for row in reversed(whole)}  # of several the first


def _united(found: list[Row], known: dict[str, Row]) -> tuple[list[Row], list[Rejection]]:
    """Returns the new rows, with what the old manifest knew, and what is left out of them."""
    rows: list[Row] = []
    left_out: list[Rejection] = []
    for row in found:
        old = known.get(row["clip_id"])
        if old is None and known and not row["labels"]:
            continue  # was not taken before either, for want of labels
        if old is not None and old.get("crc32") is not None and old["crc32"] != row["crc32"]:
            left_out.append(Rejection(row["clip_id"], row["shard"], "other bytes than the manifest's"))
            continue
        rows.append(row | {name: old[name] for name in _KEPT if old is not None and old.get(name) is not None})
    there = {row["clip_id"] for row in found}
    left_out += [
        Rejection(clip_id, row["shard"], "missing in the tars")
        for clip_id, row in known.items()
        if clip_id not in there
    ]
    return rows, left_out


def _rejected_before(location: str) -> pa.Table:
    path = storage.join_path(location, REJECTED_NAME)
    try:
        with storage.open_input(path) as stream:
            return pq.read_table(stream).cast(REJECTED_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, PipelineError):
        return REJECTED_SCHEMA.empty_table()


def _without_doubles(tables: list[pa.Table]) -> pa.Table:
    seen = dict.fromkeys(tuple(row.values()) for table in tables for row in table.to_pylist())
    return table_of_rows((Rejection(*values) for values in seen), REJECTED_SCHEMA)
