"""A dataset folder while it is being made: who may write there, what a stopped run had done, when it is finished."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.rejections import REJECTED_NAME, Rejection, count_by_reason, write_rejections
from pipeline.manifest import CLASSES_NAME, MANIFEST_NAME, SCHEMA, Manifest, write_manifest
from pipeline.vocabulary import Vocabulary

UNFINISHED = ".unfinished"
"""The folder in a dataset that holds the ledgers of its shards until the manifest is written."""

ROW_SCHEMA = pa.schema([field.with_nullable(True) for field in SCHEMA])
_FINGERPRINT_KEY = b"fingerprint"
_REJECTED_KEY = b"rejected"


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of the clips that were to go into one shard."""

    rows: pa.Table
    """The accepted ones, in `ROW_SCHEMA`."""
    rejections: list[Rejection]


def check_folder(dataset: str, name: str, *, overwrite: bool) -> None:
    """See that shards called `<name>-000000.tar`, `<name>-000001.tar` and so on may be made in a folder.

    Raises:
        UsageError: it is a finished dataset, or holds tars that no ingest of this name made.
    """
    if _is_finished(dataset) and not overwrite:
        raise UsageError(f"{dataset}: is a finished dataset. Choose another --out, or replace it with --overwrite")
    tars = [file.name for file in storage.list_files(dataset, ".tar")]
    foreign = [tar for tar in tars if not re.fullmatch(re.escape(name) + r"-\d{6,}\.tar", tar)]
    if tars and not (overwrite or storage.exists(storage.join_path(dataset, UNFINISHED))):
        foreign = tars
    if foreign:
        raise UsageError(
            f"{dataset}: holds tars that this command did not make, such as {foreign[0]}. "
            f"Choose an empty --out, or run `pipeline index {dataset}` to use them as they are"
        )


def claim_folder(dataset: str) -> None:
    """Make a checked folder look unfinished from now on."""
    unfinished = storage.join_path(dataset, UNFINISHED)
    if _is_finished(dataset):
        storage.remove(unfinished)  # ledgers of the dataset that is to be replaced
    storage.publish_bytes(storage.join_path(unfinished, "started"), b"")
    # The manifest goes before anything that it speaks of.
    for file in (MANIFEST_NAME, CLASSES_NAME, REJECTED_NAME):
        storage.remove(storage.join_path(dataset, file))
    storage.remove_staged(dataset)


def finished_ledgers(dataset: str, fingerprints: dict[str, str]) -> dict[str, Ledger]:
    """Give the ledgers of the shards that a stopped run finished, and remove the tars that are of no use.

    Args:
        dataset: a claimed folder.
        fingerprints: name of each planned shard → digest of its plan.
    """
    tars = {file.name for file in storage.list_files(dataset, ".tar")}
    ledgers: dict[str, Ledger] = {}
    for shard, fingerprint in fingerprints.items():
        ledger = _read_ledger(dataset, shard, fingerprint)
        if ledger is not None and (shard in tars or not ledger.rows.num_rows):
            ledgers[shard] = ledger
    for tar in tars - ledgers.keys():
        storage.remove(storage.join_path(dataset, tar))
    return ledgers


def publish_ledger(dataset: str, shard: str, fingerprint: str, ledger: Ledger) -> None:
    """Write down that a shard is finished."""
    rejected = json.dumps([(item.clip_id, item.path, item.reason, item.detail) for item in ledger.rejections])
    table = ledger.rows.replace_schema_metadata({_FINGERPRINT_KEY: fingerprint, _REJECTED_KEY: rejected})
    with storage.publish(_ledger_location(dataset, shard)) as staged:
        pq.write_table(table, staged, compression="zstd")


def finish_folder(
    dataset: str, ledgers: Sequence[Ledger], rejections: list[Rejection], vocabulary: Vocabulary
) -> Manifest:
    """Write the list of what was left out and then the manifest: from here on the dataset is finished.

    Args:
        dataset: a claimed folder.
        ledgers: of all shards, in order.
        rejections: what was left out besides the ledgers' own.
        vocabulary: the classes that the labels point into.

    Raises:
        ManifestError: not one clip was accepted.
    """
    everything = rejections + [item for ledger in ledgers for item in ledger.rejections]
    write_rejections(dataset, everything)
    rows = pa.concat_tables([ROW_SCHEMA.empty_table(), *(ledger.rows for ledger in ledgers)])
    if not rows.num_rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_by_reason(everything).items())
        first = next((f"; the first: {item.detail}" for item in everything if item.detail), "")
        raise ManifestError(f"{dataset}: holds no clip that can be used ({reasons or 'none at all'}{first})")
    manifest = write_manifest(dataset, rows, vocabulary)
    storage.remove(storage.join_path(dataset, UNFINISHED))
    return manifest


def _is_finished(dataset: str) -> bool:
    return storage.exists(storage.join_path(dataset, MANIFEST_NAME))


def _read_ledger(dataset: str, shard: str, fingerprint: str) -> Ledger | None:
    location = _ledger_location(dataset, shard)
    if not storage.exists(location):
        return None
    with storage.open_input(location) as stream:
        rows = pq.read_table(stream)
    metadata = rows.schema.metadata or {}
    if metadata.get(_FINGERPRINT_KEY, b"").decode() != fingerprint:
        return None
    return Ledger(rows.cast(ROW_SCHEMA), [Rejection(*values) for values in json.loads(metadata[_REJECTED_KEY])])


def _ledger_location(dataset: str, shard: str) -> str:
    return storage.join_path(storage.join_path(dataset, UNFINISHED), f"{shard.removesuffix('.tar')}.parquet")
