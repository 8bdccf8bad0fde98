"""The logit store: one Parquet part a shard, `clip_id` → float16 `logits`, each stamped with what made it.

A store may keep each teacher's own logits too, only the K largest, or several views of a clip; `pipeline.logits.forms`
has the columns. Whatever the form, `LogitStore.align` gives the same array, and readers know no other.

`STORE/<shard stem>.parquet` holds a shard's rows in shard order. `STORE/store.json` is the stamp of the whole, and
`STORE/failed.parquet` lists the clips that have no logits, with reasons. `STORE/files.json` lists the files, for
readers behind a web server.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.parquet_files import publish_table
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import LogitStoreError
from pipeline.logits.alignment import AlignedLogits, load_aligned, target_rows, write_aligned
from pipeline.logits.forms import (
    VIEW_COLUMNS,
    TopLogits,
    columns_of,
    dense_logits,
    matrix,
    member_column,
    table_of,
    value_columns,
    view_rows,
)
from pipeline.logits.stamp import StoreStamp
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage

STORE_NAME = "store.json"
FAILED_NAME = "failed.parquet"

_PART_SUFFIX = ".parquet"
_STAMP_KEY, _IDENTITY_KEY, _FAILURES_KEY, _DEVICE_KEY = b"stamp", b"shard_identity", b"failures", b"device"
_FAILED_SCHEMA = pa.schema([(name, pa.string()) for name in ("part", "clip_id", "reason", "detail")])
_FOOTER_READERS = 16
_CHECKED_VIEW_COLUMNS = [name for name in VIEW_COLUMNS if name != "view_seed"]
_PART_READERS = 4
"""Parts that are read and decompressed at the same time, and so are in memory together."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFailure:
    """A clip that was tried and got no logits."""

    clip_id: str
    reason: str
    """A short fixed phrase that can be counted."""
    detail: str = ""


_FAILURES = TypeAdapter(tuple[ClipFailure, ...])


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitPart:
    """One finished part, as its footer tells it."""

    file: storage.StoredFile
    clips: int
    """Clips with logits; each has a row, or one for each of its views."""
    stamp: StoreStamp
    shard_identity: str
    """`Manifest.shard_identity` of the shard that it was made from."""
    failures: tuple[ClipFailure, ...]
    devices: tuple[str, ...] = ()
    """Which GPUs or processors computed it, where that was noted."""

    @property
    def stem(self) -> str:
        """The shard's name without `.tar`."""
        return self.file.name.removesuffix(_PART_SUFFIX)


def part_stem(shard: str) -> str:
    """Returns the name of a shard's part: `train-000000.tar` → `train-000000`."""
    return PurePosixPath(shard).name.removesuffix(".tar")


def part_schema(
    stamp: StoreStamp, shard_identity: str, failures: Sequence[ClipFailure] = (), device: str = ""
) -> pa.Schema:
    """Returns the schema of a part: columns that any Parquet reader opens, and our stamp in the metadata."""
    return pa.schema(
        columns_of(stamp),
        metadata={
            _STAMP_KEY: stamp.to_json(),
            _IDENTITY_KEY: shard_identity,
            _FAILURES_KEY: _FAILURES.dump_json(tuple(failures)),
            **({_DEVICE_KEY: device} if device else {}),
        },
    )


def publish_part(
    store: str,
    shard_stem: str,
    clip_ids: Sequence[str],
    logits: np.ndarray | TopLogits,
    stamp: StoreStamp,
    shard_identity: str,
    failures: Sequence[ClipFailure] = (),
    *,
    members: np.ndarray | None = None,
    device: str = "",
) -> None:
    """Write one part of the store; readers see all of it, its failures included, or none.

    Args:
        store: the store's folder or URL.
        shard_stem: from `part_stem`.
        clip_ids: in shard order.
        logits: (rows, classes), finite in float16; a row a clip, or a clip's views one after the other. Where the
            stamp keeps the largest alone, they are chosen here, unless `TopLogits` are given.
        stamp: what made them.
        shard_identity: of the shard.
        failures: the shard's clips that have no logits.
        members: (teachers, rows, classes), float16, each teacher's own, where the stamp keeps them.
        device: the GPU or processor that computed them, where that is to be noted.

    Raises:
        ValueError: the shapes disagree, or a logit is not finite.
        StorageFullError: there is no room for the part.
    """
    logits = logits if isinstance(logits, TopLogits) else np.asarray(logits, dtype=np.float16)
    _check_values(shard_stem, len(clip_ids), logits, members, stamp)
    table = table_of(part_schema(stamp, shard_identity, failures), stamp, clip_ids, logits, members)
    publish_part_table(store, shard_stem, table, stamp, shard_identity, failures, device=device)


def publish_part_table(
    store: str,
    shard_stem: str,
    table: pa.Table,
    stamp: StoreStamp,
    shard_identity: str,
    failures: Sequence[ClipFailure] = (),
    *,
    device: str = "",
) -> None:
    """Write one part of the store whose columns are there already; otherwise as `publish_part`."""
    schema = part_schema(stamp, shard_identity, failures, device)
    whole = table.replace_schema_metadata(schema.metadata).combine_chunks()
    # Plain pages: BYTE_STREAM_SPLIT would save 12 %, but DuckDB does not read it for half floats.
    publish_table(storage.join_path(store, shard_stem + _PART_SUFFIX), whole, use_dictionary=False)


def _check_values(
    stem: str, clips: int, logits: np.ndarray | TopLogits, members: np.ndarray | None, stamp: StoreStamp
) -> None:
    rows = clips * stamp.view_count
    wanted: dict[str, tuple[int | None, ...]] = {"logits": (rows, stamp.classes)}
    found = {"logits": logits} if isinstance(logits, np.ndarray) else {}
    if isinstance(logits, TopLogits):
        wanted = {"top_classes": (rows, stamp.top_k), "top_logits": (rows, stamp.top_k), "rest_logit": (rows,)}
        found = {"top_classes": logits.classes, "top_logits": logits.logits, "rest_logit": logits.rest}
    if stamp.members is not None:
        wanted["members"] = (len(stamp.teachers), rows, stamp.classes)
    if members is not None:
        found["members"] = members
    shapes = {name: values.shape for name, values in found.items()}
    if shapes != wanted:
        views = f" with {stamp.view_count} views" if stamp.views else ""
        raise ValueError(f"{shapes} do not fit {clips} clips{views} of {stamp.classes} classes; give {wanted}")
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of {stem} are not finite in float16")


def list_parts(store: str) -> list[LogitPart]:
    """Read the footers of all finished parts, by name.

    Raises:
        LogitStoreError: a Parquet file of the folder is damaged, or is no part of a logit store.
    """
    with Threads(_FOOTER_READERS, "read footers") as readers:
        return [part for _, part in readers.map(lambda file: read_part(store, file), part_files(store), name=_name)]


def finished_parts(store: str, stamp: StoreStamp) -> dict[str, LogitPart]:
    """Find the parts that `stamp` made, by shard stem; damaged parts are told and count as missing."""
    return {part.stem: part for part in _readable_parts(store) if part.stamp == stamp}


def other_parts(store: str, stamp: StoreStamp) -> list[LogitPart]:
    """Find the parts that another stamp than this one made."""
    return [part for part in _readable_parts(store) if part.stamp != stamp]


def _readable_parts(store: str) -> list[LogitPart]:
    def read(file: storage.StoredFile) -> LogitPart | None:
        try:
            return read_part(store, file)
        except LogitStoreError as error:
            _log.warning("%s", error)
            return None

    with Threads(_FOOTER_READERS, "read footers") as readers:
        return [part for _, part in readers.map(read, part_files(store), name=_name) if part]


def _name(file: storage.StoredFile) -> str:
    return file.name


def part_files(store: str) -> list[storage.StoredFile]:
    """List the files of a store that should be parts, by name."""
    return [file for file in storage.list_files(store, _PART_SUFFIX) if file.name != FAILED_NAME]


def read_part(store: str, file: storage.StoredFile) -> LogitPart:
    """Read the footer of one file of `part_files`.

    Raises:
        LogitStoreError: it is damaged, or is no part of a logit store.
    """
    location = storage.join_path(store, file.name)
    with _open_part(location) as part:
        return _described(location, file, part)


def read_part_table(store: str, shard_stem: str) -> tuple[LogitPart, pa.Table]:
    """Read one part's footer and all of its columns.

    Raises:
        LogitStoreError: it is not there, is damaged, or is no part of a logit store.
    """
    name = shard_stem + _PART_SUFFIX
    location = storage.join_path(store, name)
    with _open_part(location, whole=True) as part:
        return _described(location, storage.StoredFile(name, 0, ""), part), part.read()


def _described(location: str, file: storage.StoredFile, part: pq.ParquetFile) -> LogitPart:
    schema, rows = part.schema_arrow, part.metadata.num_rows
    metadata = schema.metadata or {}
    if missing := {_STAMP_KEY, _IDENTITY_KEY, _FAILURES_KEY} - metadata.keys():
        raise LogitStoreError(f"{location}: not a part of a logit store (it lacks {sorted(missing)}). Move it away.")
    stamp = StoreStamp.from_json(metadata[_STAMP_KEY], location)
    try:
        failures = _FAILURES.validate_json(metadata[_FAILURES_KEY])
    except ValidationError as error:
        raise LogitStoreError(f"{location}: its list of failed clips can't be read. Delete the part.") from error
    if not schema.equals(part_schema(stamp, "")):
        raise LogitStoreError(
            f"{location}: its columns are not those of a logit part of {stamp.classes} classes. Delete the part."
        )
    if rows % stamp.view_count:
        raise LogitStoreError(f"{location}: {rows} rows are no {stamp.view_count} views of each clip. Delete the part.")
    identity, clips = metadata[_IDENTITY_KEY].decode(), rows // stamp.view_count
    devices = tuple(filter(None, metadata.get(_DEVICE_KEY, b"").decode().split("; ")))
    return LogitPart(file=file, clips=clips, stamp=stamp, shard_identity=identity, failures=failures, devices=devices)


@contextmanager
def _open_part(location: str, *, whole: bool = False) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_input(location, whole=whole) as stream, pq.ParquetFile(stream) as part:
            yield part
    except (pa.ArrowException, OSError) as error:
        raise LogitStoreError(
            f"{location}: damaged ({str(error).splitlines()[0]}). Delete it and run `pipeline teacher-logits` again."
        ) from error


def write_stamp(store: str, stamp: StoreStamp) -> None:
    """Write store.json, before the first part, so that an interrupted store is known too."""
    storage.publish_bytes(storage.join_path(store, STORE_NAME), stamp.to_json() + b"\n")


def read_stamp(store: str) -> StoreStamp | None:
    """Read store.json; None where there is none yet.

    Raises:
        LogitStoreError: it can't be read.
    """
    location = storage.join_path(store, STORE_NAME)
    return StoreStamp.from_json(storage.read_bytes(location), location) if storage.exists(location) else None


def write_failures(store: str, parts: Sequence[LogitPart]) -> None:
    """Gather the parts' failures in `failed.parquet`, which only repeats what the parts already tell."""
    rows = [{"part": part.stem, **asdict(failure)} for part in parts for failure in part.failures]
    publish_table(storage.join_path(store, FAILED_NAME), pa.Table.from_pylist(rows, schema=_FAILED_SCHEMA))


def open_store(store: str) -> "LogitStore":
    """Open a store for reading, after comparing every part's stamp with store.json.

    Raises:
        LogitStoreError: there is no store, it holds no logits, a part is damaged, or parts were made otherwise.
    """
    stamp = read_stamp(store)
    if stamp is None:
        raise LogitStoreError(
            f"{store}: no {STORE_NAME}, so this is not a logit store. Make one with `pipeline teacher-logits`, "
            "or correct the path."
        )
    if stamp.values != "logits":
        raise LogitStoreError(
            f"{store}: holds {stamp.values}, but students learn from logits, before the sigmoid. "
            "Make the store again with `pipeline teacher-logits`."
        )
    parts = list_parts(store)
    for part in parts:
        if part.stamp != stamp:
            raise LogitStoreError(
                f"{storage.join_path(store, part.file.name)}: made otherwise than {STORE_NAME} says "
                f"({part.stamp.differences_from(stamp)}). Run the `pipeline teacher-logits` that made {STORE_NAME} "
                "again to redo such parts, or delete the part."
            )
    return LogitStore(location=store, stamp=stamp, parts=tuple(parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitStore:
    """A store whose parts were all made alike."""

    location: str
    stamp: StoreStamp
    parts: tuple[LogitPart, ...]
    """By name."""

    @property
    def clip_count(self) -> int:
        """Clips of all parts."""
        return sum(part.clips for part in self.parts)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.file.size for part in self.parts)

    def clip_ids(self) -> pa.ChunkedArray:
        """Read the clip ids of all parts, each clip's once, in their order."""
        chunks = [chunk for part in self.parts for chunk in self.part_clip_ids(part).chunks]
        return pa.chunked_array(chunks, pa.string())

    def part_clip_ids(self, part: LogitPart) -> pa.ChunkedArray:
        """Read one part's clip ids, each clip's once."""
        ids = self._read(part, ["clip_id"])["clip_id"]
        return ids if self.stamp.views is None else ids.take(pa.array(np.arange(0, len(ids), self.stamp.view_count)))

    def part_logits(self, part: LogitPart) -> np.ndarray:
        """Read one part's logits of the clips as they are: (clips, classes), float16, in the order of its clip ids."""
        return self.part_views(part)[:, 0]

    def part_views(self, part: LogitPart) -> np.ndarray:
        """Read one part's logits of all views: (clips, views, classes), float16; view 0 is the clip as it is.

        Raises:
            LogitStoreError: the part is damaged, or its views are not those that this version draws.
        """
        names = value_columns(self.stamp) + ([] if self.stamp.views is None else ["clip_id", *_CHECKED_VIEW_COLUMNS])
        table = self._read(part, names)
        if self.stamp.views is not None:
            self._check_views(part, table)
        rows = dense_logits(table, self.stamp)  # (clips x views, classes)
        return rows.reshape(-1, self.stamp.view_count, self.stamp.classes)

    def part_members(self, part: LogitPart) -> np.ndarray:
        """Read one part's logits by each teacher: (teachers, rows, classes), float16; a clip's views are neighbours.

        Raises:
            LogitStoreError: the store does not keep them, or the part is damaged.
        """
        return np.stack([self.part_member(part, number) for number in range(1, len(self.stamp.teachers) + 1)])

    def part_member(self, part: LogitPart, number: int) -> np.ndarray:
        """Read the logits of one teacher, the first is number 1, of one part: (rows, classes), float16.

        Raises:
            LogitStoreError: the store does not keep it, or the part is damaged.
        """
        if self.stamp.members is None:
            raise LogitStoreError(
                f"{self.location}: holds the mean of its teachers' logits, not each teacher's own. Make a store with "
                "`pipeline teacher-logits --keep-members`."
            )
        name = member_column(number)
        return matrix(self._read(part, [name])[name], self.stamp.classes)

    def _member_views(self, part: LogitPart, number: int) -> np.ndarray:
        return self.part_member(part, number).reshape(-1, self.stamp.view_count, self.stamp.classes)

    def _check_views(self, part: LogitPart, table: pa.Table) -> None:
        """Compare the order of the rows, and the first and the last clip's views, with what is drawn today."""
        count = self.stamp.view_count
        numbers = table["view"].to_numpy().reshape(-1, count)  # (clips, views)
        good = bool((numbers == np.arange(count)).all())
        for first in {0, max(len(table) - count, 0)} if good and len(table) else ():
            rows = table.slice(first, count)
            *_, shifts, gains, lows, highs = view_rows(self.stamp, rows["clip_id"].to_pylist()[:1])
            drawn = zip(_CHECKED_VIEW_COLUMNS, ([*range(count)], shifts, gains, lows, highs), strict=True)
            good = good and all(rows[name].to_pylist() == values for name, values in drawn)
        if not good:
            raise LogitStoreError(
                f"{storage.join_path(self.location, part.file.name)}: its views are not those that its stamp and this "
                "version of the program draw. Delete the part and run `pipeline teacher-logits` again."
            )

    def _check_finite(self, part: LogitPart, logits: np.ndarray) -> None:
        """Refuse numbers that `publish_part` would not have written; one of them would spoil a whole training."""
        # All exponent bits set is infinity or NaN. NumPy's own test of half floats takes four times as long.
        odd = (logits.view(np.uint16) & 0x7C00 == 0x7C00).any(axis=tuple(range(1, logits.ndim)))  # (clips,)
        if odd.any():
            first = self.part_clip_ids(part)[int(np.flatnonzero(odd)[0])].as_py()
            raise LogitStoreError(
                f"{storage.join_path(self.location, part.file.name)}: the logits of {odd.sum()} clips are not finite, "
                f"such as those of {first}. Delete the part and run `pipeline teacher-logits` again."
            )

    def _read(self, part: LogitPart, columns: Sequence[str]) -> pa.Table:
        whole = any(name != "clip_id" for name in columns)
        with _open_part(storage.join_path(self.location, part.file.name), whole=whole) as file:
            return file.read(columns=list(columns))

    def check_vocabulary(self, vocabulary: Vocabulary, dataset: str) -> None:
        """Refuse a dataset whose classes are not the store's.

        Raises:
            LogitStoreError: the class lists differ.
        """
        found, expected = self.stamp.vocabulary_sha256, vocabulary.sha256
        if self.stamp.classes != len(vocabulary) or found != expected:
            raise LogitStoreError(
                f"{self.location}: made for {self.stamp.classes} classes with hash {found[:12]}, but {dataset} has "
                f"{len(vocabulary)} classes with hash {expected[:12]}. Run `pipeline teacher-logits` on this dataset, "
                "or choose the store that was made with its class list."
            )

    def align(
        self, manifest: Manifest, cache_dir: str | Path, *, all_views: bool = False, member: int | None = None
    ) -> AlignedLogits:
        """Returns the logits in the manifest's order, from the cache where this was done before.

        The cache is keyed by all that the array depends on. Processes may do this at the same time: each publishes
        the same bytes, whole. Only a few parts are in memory at a time.

        Args:
            manifest: of any dataset with the store's class list.
            cache_dir: a local folder; (clips x classes x 2) bytes are written there, times the views where all are
                wanted. It may be cleared at any time.
            all_views: align (clips, views, classes), from a store with views, and not (clips, classes), which are the
                logits of the clips as they are.
            member: align the logits of the teacher of this number, from 1, and not the mean.

        Raises:
            LogitStoreError: the class lists differ, no clip of the dataset has logits, or a part is damaged.
        """
        self.check_vocabulary(manifest.vocabulary, manifest.location)
        files = [(part.file.name, part.file.size, part.file.version) for part in self.parts]
        wanted = (["all views"] if all_views else []) + ([f"teacher {member}"] if member else [])
        key = json.dumps([manifest.identity, self.stamp.to_json().decode(), files, *wanted])
        path = storage.local_path(cache_dir) / f"logits-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        try:
            return load_aligned(path)
        except FileNotFoundError:
            return self._build(manifest, path, all_views, member)

    def _build(self, manifest: Manifest, path: Path, all_views: bool, member: int | None) -> AlignedLogits:
        rows, repeated = target_rows(self.clip_ids(), manifest.clip_ids)  # (store rows,)
        has_logits = np.zeros(len(manifest), dtype=bool)
        has_logits[rows[rows >= 0]] = True
        if not has_logits.any():
            raise LogitStoreError(
                f"{self.location}: holds logits of {self.clip_count} clips, but none of the {len(manifest)} clips of "
                f"{manifest.location}. Run `pipeline teacher-logits --data {manifest.location}`."
            )
        if repeated:
            _log.warning("%s: %d clips are in several parts; the first part counts", self.location, repeated)
        views = (self.stamp.view_count,) if all_views else ()
        shape = (len(manifest), *views, self.stamp.classes)
        return write_aligned(path, shape, has_logits, repeated, self._pieces(rows, all_views, member))

    def _pieces(self, rows: np.ndarray, all_views: bool, member: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        starts = np.cumsum([0] + [part.clips for part in self.parts])
        targets = [rows[start : start + part.clips] for part, start in zip(self.parts, starts, strict=False)]
        needed = [place for place, of_part in enumerate(targets) if (of_part >= 0).any()]

        def read(place: int) -> tuple[np.ndarray, np.ndarray]:
            wanted = targets[place] >= 0  # (part's clips,)
            part = self.parts[place]
            logits = self.part_views(part) if member is None else self._member_views(part, member)
            self._check_finite(part, logits)
            return targets[place][wanted], (logits if all_views else logits[:, 0])[wanted]

        with Threads(_PART_READERS, "read parts") as readers:
            # One less than are read at once waits: with the one that is handed on, that many are in memory.
            ahead = _PART_READERS - 1
            for _, piece in readers.map(read, needed, name=lambda place: self.parts[place].file.name, ahead=ahead):
                yield piece
