"""A dataset folder that is being made or added to: who may write there, what a stopped run did, when it is finished."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import (
    CLASSES_NAME,
    MANIFEST_NAME,
    SCHEMA,
    Manifest,
    with_present_names,
    write_manifest,
)
from pipeline.dataset.parquet_files import publish_table
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.rejections import (
    REJECTED_NAME,
    REJECTED_SCHEMA,
    Rejection,
    tabulate,
    told_in_one_line,
    write_rejections,
)
from pipeline.storage import files as storage

UNFINISHED = ".unfinished"
"""The folder in a dataset that holds the ledgers of its shards until the manifest is written."""

ROW_SCHEMA = pa.schema([field.with_nullable(True) for field in SCHEMA])
_FINGERPRINT_KEY = b"fingerprint"
_REJECTED_KEY = b"rejected"
_NOTES_KEY = b"notes"
_STARTED_NAME = "started"
"""In `UNFINISHED`: what the folder held when the work began."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of the clips that were to go into one shard."""

    rows: pa.Table
    """The accepted ones, in `ROW_SCHEMA`."""
    rejections: list[Rejection]
    notes: Mapping[str, int] = field(default_factory=dict)
    """What is worth a word of accepted ones → how often."""


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """A folder in which shards called `<name>-000000.tar`, `<name>-000001.tar` and so on are made."""

    location: str
    """A path or a URL."""
    name: str
    base: Manifest | None = None
    """The finished dataset there that is added to; None makes a new one."""

    @property
    def first_number(self) -> int:
        """Returns the number of the first shard to make: behind those that are there."""
        numbers = [int(shard[len(self.name) + 1 : -4]) for shard in self._kept if self._is_of_this_name(shard)]
        return max(numbers, default=-1) + 1

    def check(self, *, overwrite: bool) -> None:
        """Check that the shards may be made.

        Raises:
            UsageError: the folder is a finished dataset that nobody asked to replace, or holds tars that no ingest of
                this name made.
        """
        storage.check_writable(self.location)
        if self.base is None and _is_finished(self.location) and not overwrite:
            raise UsageError(
                f"{self.location}: is a finished dataset. Choose another --out, put more into it with --add, or "
                "replace it with --overwrite"
            )
        tars = [file.name for file in storage.list_files(self.location, ".tar")]
        foreign = [tar for tar in tars if not self._is_of_this_name(tar)] if self.base is None else []
        if not (overwrite or self._is_under_way()):
            foreign = [tar for tar in tars if self.base is None or self._is_ours(tar)]
        if foreign:
            raise UsageError(
                f"{self.location}: holds tars that this command did not make, such as {foreign[0]}. "
                f"Choose an empty --out, or run `pipeline index {self.location}` to use them as they are"
            )

    def claim(self) -> None:
        """Make the checked folder look unfinished from now on; a dataset that is added to stays readable as it was."""
        unfinished = storage.join_path(self.location, UNFINISHED)
        if not self._is_under_way() or (self.base is None and _is_finished(self.location)):
            storage.remove(unfinished)  # ledgers of other work
            if self.base is not None and storage.exists(before := storage.join_path(self.location, REJECTED_NAME)):
                storage.publish_bytes(storage.join_path(unfinished, REJECTED_NAME), storage.read_bytes(before))
            storage.publish_bytes(storage.join_path(unfinished, _STARTED_NAME), self._beginning)
        if self.base is None:
            # The manifest goes before anything that it speaks of.
            for file in (MANIFEST_NAME, CLASSES_NAME, REJECTED_NAME):
                storage.remove(storage.join_path(self.location, file))
        storage.remove_staged(self.location)

    def finished_shards(self, fingerprints: Mapping[str, str]) -> set[str]:
        """Returns the shards that a stopped run finished, and removes the tars that are of no use.

        Args:
            fingerprints: name of each planned shard → digest of its plan.
        """
        tars = {file.name for file in storage.list_files(self.location, ".tar") if self._is_ours(file.name)}
        finished: set[str] = set()
        for shard, fingerprint in fingerprints.items():
            ledger = _read_ledger(self.location, shard, fingerprint)
            if ledger is not None and (shard in tars or not ledger.rows.num_rows):
                finished.add(shard)
        for tar in tars - finished:
            storage.remove(storage.join_path(self.location, tar))
        return finished

    def ledgers(self, fingerprints: Mapping[str, str]) -> list[Ledger]:
        """Returns the ledgers of all shards, in order.

        Raises:
            ManifestError: a shard is not made.
        """
        ledgers = [_read_ledger(self.location, shard, fingerprint) for shard, fingerprint in fingerprints.items()]
        made = [ledger for ledger in ledgers if ledger is not None]
        if len(made) < len(ledgers):
            missing = len(ledgers) - len(made)
            raise ManifestError(f"{self.location}: {missing} shards are not made. The same command goes on from here")
        return made

    def finish(self, ledgers: Iterable[Ledger], rejected: pa.Table, vocabulary: Vocabulary) -> Manifest:
        """Write the list of what was left out and then the manifest: from here on the dataset is finished.

        Args:
            ledgers: of all shards, in order.
            rejected: what was left out besides the ledgers' own, in `REJECTED_SCHEMA`.
            vocabulary: the classes that the labels point into.

        Raises:
            ManifestError: not one clip was accepted.
        """
        if self.base is None:
            return finish_folder(self.location, ledgers, [rejected], vocabulary)
        rows = self.base.table.cast(ROW_SCHEMA)
        return finish_folder(self.location, ledgers, [*self._left_out_before(), rejected], vocabulary, [rows])

    @property
    def _kept(self) -> frozenset[str]:
        return frozenset(self.base.shards if self.base is not None else ())

    @property
    def _beginning(self) -> bytes:
        return self.base.identity.encode() if self.base is not None else b""

    def _is_under_way(self) -> bool:
        """Whether a stopped run of the same kind was at work here."""
        started = storage.join_path(storage.join_path(self.location, UNFINISHED), _STARTED_NAME)
        return storage.exists(started) and storage.read_bytes(started) == self._beginning

    def _is_of_this_name(self, tar: str) -> bool:
        return re.fullmatch(re.escape(self.name) + r"-\d{6,}\.tar", tar) is not None

    def _is_ours(self, tar: str) -> bool:
        """Whether a tar is none of the dataset that is added to, and called as this command calls its own."""
        return tar not in self._kept and (self.base is None or self._is_of_this_name(tar))

    def _left_out_before(self) -> list[pa.Table]:
        before = storage.join_path(storage.join_path(self.location, UNFINISHED), REJECTED_NAME)
        if not storage.exists(before):
            return []
        with storage.open_input(before) as stream:
            return [pq.read_table(stream).cast(REJECTED_SCHEMA)]


def publish_ledger(dataset: str, shard: str, fingerprint: str, ledger: Ledger) -> None:
    """Write down that a shard is finished."""
    rejected = json.dumps([(item.clip_id, item.path, item.reason, item.detail) for item in ledger.rejections])
    metadata = {_FINGERPRINT_KEY: fingerprint, _REJECTED_KEY: rejected, _NOTES_KEY: json.dumps(ledger.notes)}
    publish_table(_ledger_location(dataset, shard), ledger.rows.replace_schema_metadata(metadata))


def finish_folder(
    dataset: str,
    ledgers: Iterable[Ledger],
    rejected: Iterable[pa.Table],
    vocabulary: Vocabulary,
    rows_before: Iterable[pa.Table] = (),
) -> Manifest:
    """Write the list of what was left out and then the manifest.

    Args:
        dataset: the folder, a path or a URL.
        ledgers: of all shards, in order.
        rejected: what was left out besides the ledgers' own.
        vocabulary: the classes that the labels point into.
        rows_before: of the dataset that is added to.

    Raises:
        ManifestError: not one clip was accepted.
    """
    tables, left_out = [ROW_SCHEMA.empty_table(), *rows_before], [REJECTED_SCHEMA.empty_table(), *rejected]
    for ledger in ledgers:
        tables.append(ledger.rows)
        left_out.append(tabulate(ledger.rejections))
    everything, rows = pa.concat_tables(left_out), pa.concat_tables(tables)
    write_rejections(dataset, everything)
    if not rows.num_rows:
        raise ManifestError(f"{dataset}: holds no clip that can be used {told_in_one_line(everything)}")
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
    rows = with_present_names(rows).cast(ROW_SCHEMA)
    rejections = [Rejection(*values) for values in json.loads(metadata[_REJECTED_KEY])]
    return Ledger(rows, rejections, json.loads(metadata.get(_NOTES_KEY, b"{}")))


def _ledger_location(dataset: str, shard: str) -> str:
    return storage.join_path(storage.join_path(dataset, UNFINISHED), f"{shard.removesuffix('.tar')}.parquet")
