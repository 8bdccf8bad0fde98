"""A dataset's manifest: one row a clip, saying in which shard its bytes lie, where, and what its labels are.

Two million rows are a few dozen megabytes of Arrow columns; nothing here makes a Python object for each clip.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.clip_ids import is_safe_name
from pipeline.dataset.clip_table import ClipTable, RaggedColumn
from pipeline.dataset.parquet_files import publish_table
from pipeline.dataset.string_columns import repeated_rows, string_bytes, string_lengths, string_parts
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import ManifestError
from pipeline.storage import files as storage

_log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.parquet"
CLASSES_NAME = "classes.csv"
VOCABULARY_KEY = b"vocabulary_sha256"
"""In the manifest's schema metadata: the digest of the class list that `labels` points into."""

SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # relative to the dataset folder
        pa.field("offset", pa.int64(), nullable=False),  # of the audio member's first byte in the tar
        pa.field("size", pa.int64(), nullable=False),  # bytes
        pa.field("format", pa.string(), nullable=False),  # flac, mp3, ogg, opus, wav …
        pa.field("labels", pa.list_(pa.int16()), nullable=False),  # indices into classes.csv
        pa.field("sample_rate", pa.int32()),  # Hz
        pa.field("frames", pa.int64()),  # samples of one channel, at that rate
        pa.field("start_seconds", pa.float32()),
        pa.field("end_seconds", pa.float32()),
        pa.field("crc32", pa.uint32()),  # of the audio bytes
        pa.field("label_mask", pa.list_(pa.int16())),  # the classes whose label is known; null: all of them
    ]
)
"""The columns of `manifest.parquet`; those from `sample_rate` on may be null or absent."""

_FORMER_NAMES = {"judged": "label_mask"}
"""Columns that earlier versions wrote under another name → their name in `SCHEMA`."""

MAX_CLIP_BYTES = 2**31 - 1
"""A larger audio member is refused, so that a lying size can't ask for the machine's whole memory."""


class Manifest:
    """A dataset's clips in shard order, as Arrow and NumPy columns.

    Args:
        location: the dataset folder, a path or a URL.
        table: rows in the columns of `SCHEMA`.
        vocabulary: the classes that the labels point into.

    Raises:
        ManifestError: the table lacks columns, or its values contradict themselves or the vocabulary.
    """

    def __init__(self, location: str, table: pa.Table, vocabulary: Vocabulary) -> None:
        self.location = location
        self.vocabulary = vocabulary
        self.table = _conform(table, location)
        """The rows; `shard` and `format` are dictionary-encoded."""
        self._check()

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def clip_ids(self) -> pa.StringArray:
        """The ids, one a row."""
        return self._column("clip_id")

    @cached_property
    def shards(self) -> list[str]:
        """The shards' names relative to the dataset, in the order in which the rows name them."""
        return self._column("shard").dictionary.to_pylist()

    @cached_property
    def shard_of_clip(self) -> np.ndarray:
        """(clips,) int32, positions in `shards`."""
        return self._column("shard").indices.to_numpy()

    @cached_property
    def offsets(self) -> np.ndarray:
        """(clips,) int64, where each clip's audio begins in its shard, in bytes."""
        return self._column("offset").to_numpy()

    @cached_property
    def sizes(self) -> np.ndarray:
        """(clips,) int64, in bytes."""
        return self._column("size").to_numpy()

    @cached_property
    def formats(self) -> pa.DictionaryArray:
        """The audio members' extensions, one a row."""
        return self._column("format")

    @cached_property
    def crc32s(self) -> np.ndarray:
        """(clips,) int64, the checksum of each clip's bytes; -1 where none is known."""
        return self._column("crc32").cast(pa.int64()).fill_null(-1).to_numpy()

    @cached_property
    def seconds(self) -> np.ndarray:
        """(clips,) float64, how long each clip is; not a number where that is not known."""
        frames, rates = (self._column(name).cast(pa.float64()) for name in ("frames", "sample_rate"))
        with np.errstate(divide="ignore", invalid="ignore"):
            return frames.fill_null(np.nan).to_numpy() / rates.fill_null(np.nan).to_numpy()

    @cached_property
    def labels_csr(self) -> tuple[np.ndarray, np.ndarray]:
        """(clips + 1,) int64 `indptr` and int16 `indices`: row r has the labels `indices[indptr[r]:indptr[r + 1]]`."""
        labels = self._column("labels")
        return labels.offsets.to_numpy().astype(np.int64), labels.values.to_numpy()

    @cached_property
    def clips(self) -> ClipTable:
        """The columns that reading and joining clips needs, for processes that do it."""
        known = self._known_classes
        return ClipTable(
            location=self.location,
            shards=self.shards,
            shard_of_clip=self.shard_of_clip,
            offsets=self.offsets,
            sizes=self.sizes,
            crc32s=self.crc32s,
            ids=RaggedColumn(*string_parts(self.clip_ids)),
            classes=len(self.vocabulary),
            labels=RaggedColumn(*self.labels_csr),
            known_classes=known,
            are_masked=None if known is None else self._column("label_mask").is_valid().to_numpy(zero_copy_only=False),
        )

    def clip_id(self, row: int) -> str:
        """Returns the id of the clip at `row`."""
        return self.clip_ids[row].as_py()

    @cached_property
    def unlabelled(self) -> np.ndarray:
        """(clips,) bool: clips of which no label is known, not even that a class is absent."""
        known, masked = self._known_classes, self.clips.are_masked
        if known is None or masked is None:
            return np.zeros(len(self), bool)
        return masked & (np.diff(known.starts) == 0)

    def with_label_share(self, share: float) -> "Manifest":
        """Returns the same clips with the labels of some of them alone; those of the others count as unknown.

        Args:
            share: of the clips that keep their labels, 0 to 1. A hash of its id decides for each clip, so that a
                smaller share is a part of a larger one, in any dataset: BLAKE2b of 8 bytes with the person
                `label share`, big-endian, below share * 2^64.
        """
        if share >= 1:
            return self
        numbers = (_label_number(clip_id) for clip_id in self.clip_ids.to_pylist())
        keep = pa.array(np.fromiter((number < share * 2.0**64 for number in numbers), bool, len(self)))
        table = self.table
        for name in ("labels", "label_mask"):
            column = self._column(name)
            known = pc.call_function("if_else", [keep, column, pa.array([[]] * len(self), column.type)])
            table = table.set_column(table.column_names.index(name), name, known)
        return Manifest(self.location, table, self.vocabulary)

    def label_matrix(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """Returns the labels of `rows` as a multi-hot matrix (rows, classes)."""
        return self.clips.label_matrix(rows, dtype)

    def label_mask(self, rows: np.ndarray) -> np.ndarray | None:
        """Returns where the labels of `rows` are known; see `ClipTable.label_mask`."""
        return self.clips.label_mask(rows)

    @cached_property
    def _known_classes(self) -> RaggedColumn | None:
        column = self._column("label_mask")
        if column.null_count == len(column):
            return None
        lengths = cast("pa.Int32Array", pc.call_function("list_value_length", [column])).fill_null(0).to_numpy()
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return RaggedColumn(starts, column.flatten().to_numpy(zero_copy_only=False).astype(np.int64))

    def known_counts(self) -> np.ndarray:
        """Returns of how many clips the label of each class is known: (classes,) int64."""
        if self._known_classes is None:
            return np.full(len(self.vocabulary), len(self), np.int64)
        counts = np.bincount(self._known_classes.values, minlength=len(self.vocabulary))
        return counts.astype(np.int64) + self._column("label_mask").null_count

    def label_counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns how many clips, or how many of those at `rows`, carry each class: (classes,) int64."""
        indptr, indices = self.labels_csr
        if rows is not None:
            chosen = np.zeros(len(self), dtype=bool)
            chosen[rows] = True
            indices = indices[np.repeat(chosen, np.diff(indptr))]
        return np.bincount(indices, minlength=len(self.vocabulary)).astype(np.int64)

    def rows_of_shard(self, shard: str) -> np.ndarray:
        """Returns the rows of one shard, ascending.

        Raises:
            KeyError: no row names that shard.
        """
        order, bounds = self._rows_by_shard
        position = self._position_of_shard[shard]
        return order[bounds[position] : bounds[position + 1]]

    def shard_identity(self, shard: str) -> str:
        """Returns a hex digest that changes when the shard's clips or their bytes do.

        Raises:
            KeyError: no row names that shard.
        """
        rows = self.rows_of_shard(shard)
        columns = (string_bytes(self.clip_ids.take(pa.array(rows))), self.sizes[rows], self.crc32s[rows])
        return _digest(*columns)

    @cached_property
    def rows_identity(self) -> str:
        """A hex digest that changes when the clips, their order or their bytes do, whatever their labels."""
        shards = [f"{shard} {self.shard_identity(shard)}".encode() for shard in self.shards]
        return _digest(string_bytes(self.clip_ids), *shards)

    @cached_property
    def identity(self) -> str:
        """A hex digest that changes when the clips, their order, their labels or the classes do."""
        known = [] if self._known_classes is None else [str(self._column("label_mask").to_pylist()).encode()]
        return _digest(self.vocabulary.sha256.encode(), string_bytes(self.clip_ids), *self.labels_csr, *known)

    @cached_property
    def _position_of_shard(self) -> dict[str, int]:
        return {shard: position for position, shard in enumerate(self.shards)}

    @cached_property
    def _rows_by_shard(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.shard_of_clip, kind="stable")
        bounds = np.searchsorted(self.shard_of_clip[order], np.arange(len(self.shards) + 1))
        return order, bounds

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def _check(self) -> None:
        for problem, rows in (
            ("an empty clip_id", np.flatnonzero(string_lengths(self.clip_ids) == 0)),
            ("a negative offset", np.flatnonzero(self.offsets < 0)),
            (
                f"a size outside 0 to {MAX_CLIP_BYTES}",
                np.flatnonzero((self.sizes < 0) | (self.sizes > MAX_CLIP_BYTES)),
            ),
            (f"a label outside 0 to {len(self.vocabulary) - 1}", self._rows_with_bad_labels()),
            (f"a class in label_mask outside 0 to {len(self.vocabulary) - 1}", self._rows_with_bad_label_masks()),
            ("the clip_id of an earlier row", repeated_rows(self.clip_ids)),
        ):
            if len(rows):
                first = int(rows[0])
                raise ManifestError(
                    f"{self.location}: {len(rows)} rows of the manifest have {problem}, the first is row {first}, "
                    f"clip {self.clip_ids[first]}. Run `pipeline index` to make it anew."
                )
        for shard in self.shards:
            if not is_safe_name(shard):
                raise ManifestError(f"{self.location}: the manifest names a shard outside its folder: {shard!r}")

    def _rows_with_bad_label_masks(self) -> np.ndarray:
        return np.array([], np.int64) if self._known_classes is None else self._rows_beyond_classes(self._known_classes)

    def _rows_with_bad_labels(self) -> np.ndarray:
        return self._rows_beyond_classes(RaggedColumn(*self.labels_csr))

    def _rows_beyond_classes(self, classes: RaggedColumn) -> np.ndarray:
        bad = np.flatnonzero((classes.values < 0) | (classes.values >= len(self.vocabulary)))
        return np.unique(np.searchsorted(classes.starts, bad, side="right") - 1)


def _label_number(clip_id: str) -> int:
    return int.from_bytes(blake2b(clip_id.encode(), digest_size=8, person=b"label share").digest())


def join_manifests(folder: str, parts: Sequence[str]) -> Manifest:
    """Read datasets that lie side by side in a folder, and have the same classes, as one.

    Args:
        folder: the folder, a path or a URL.
        parts: the names of the datasets' folders in it.

    Raises:
        ManifestError: one is no dataset, their classes differ, or a clip is in two of them.
    """
    manifests = {part: read_manifest(storage.join_path(folder, part)) for part in parts}
    vocabulary = manifests[parts[0]].vocabulary
    tables: list[pa.Table] = []
    for part, manifest in manifests.items():
        if manifest.vocabulary.sha256 != vocabulary.sha256:
            raise ManifestError(f"{folder}: {part} has other classes than {parts[0]}; make both anew from one source")
        shards = pa.array([f"{part}/{shard}" for shard in manifest.shards], pa.string())
        named = pa.DictionaryArray.from_arrays(pa.array(manifest.shard_of_clip), shards)
        place = manifest.table.column_names.index("shard")
        tables.append(manifest.table.set_column(place, "shard", named.cast(pa.string())))
    plain = [table.cast(SCHEMA) for table in tables]
    return Manifest(folder, pa.concat_tables(plain), vocabulary)


def read_manifest(dataset: str | Path) -> Manifest:
    """Open the manifest of a dataset folder.

    Raises:
        ManifestError: it is not there, is malformed, contradicts itself, or was made for other classes than the
            folder's `classes.csv`.
    """
    location = storage.join_path(dataset, MANIFEST_NAME)
    if not storage.exists(location):
        if not storage.is_remote(dataset) and not storage.exists(dataset):
            raise ManifestError(f"{dataset}: there is no such folder. Give the folder of a dataset.")
        raise ManifestError(
            f"{dataset}: has no {MANIFEST_NAME}. Run `pipeline index {dataset}` to make it from the tars."
        )
    try:
        with storage.open_input(location, whole=True) as stream:
            table = _read_columns(stream, location)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"{location}: is not readable Parquet ({error}). Run `pipeline index {dataset}`."
        ) from error
    vocabulary = _read_classes(dataset)
    found = (table.schema.metadata or {}).get(VOCABULARY_KEY, b"none").decode(errors="replace")
    if found != vocabulary.sha256:
        raise ManifestError(
            f"{location}: made with classes {found[:12]}, but {CLASSES_NAME} beside it hashes to "
            f"{vocabulary.sha256[:12]}. Put the right {CLASSES_NAME} back, or run `pipeline index {dataset}`."
        )
    manifest = Manifest(str(dataset), table, vocabulary)
    # Decoding the columns takes more than they do; give that back.
    pa.default_memory_pool().release_unused()
    return manifest


def write_manifest(dataset: str | Path, table: pa.Table, vocabulary: Vocabulary) -> Manifest:
    """Write a dataset's `classes.csv` and then its `manifest.parquet`, each whole; equal rows give equal bytes.

    Raises:
        ManifestError: the rows contradict themselves or the vocabulary; nothing is written.
    """
    manifest = Manifest(str(dataset), table, vocabulary)
    storage.publish_bytes(storage.join_path(dataset, CLASSES_NAME), vocabulary.to_csv_bytes())
    plain = manifest.table.cast(SCHEMA).replace_schema_metadata({VOCABULARY_KEY: vocabulary.sha256})
    publish_table(storage.join_path(dataset, MANIFEST_NAME), plain, row_group_size=2**17)
    return manifest


def _read_classes(dataset: str | Path) -> Vocabulary:
    location = storage.join_path(dataset, CLASSES_NAME)
    if not storage.exists(location):
        raise ManifestError(
            f"{dataset}: has no {CLASSES_NAME}, so nobody can say what its labels mean. Put it back, or run "
            f"`pipeline index {dataset} --classes CSV`."
        )
    return read_vocabulary(location)


def with_present_names(table: pa.Table) -> pa.Table:
    """Rename the columns that an earlier version of this program wrote under another name."""
    renamed = table.rename_columns(_present_names(table.column_names))
    return renamed.replace_schema_metadata(table.schema.metadata)  # which Arrow drops


def _present_names(columns: Sequence[str]) -> list[str]:
    return [now if (now := _FORMER_NAMES.get(name, name)) == name or now not in columns else name for name in columns]


def _read_columns(stream: BinaryIO, location: str) -> pa.Table:
    file = pq.ParquetFile(stream, read_dictionary=_ENCODED, pre_buffer=False)
    stored = file.schema_arrow.names
    names = {name: now for name, now in zip(stored, _present_names(stored), strict=True) if now in SCHEMA.names}
    for name, now in names.items():
        if name != now:
            _log.info("%s: its column %s is read as %s, as it is called now", location, name, now)
    # One column after the other: what reading one takes besides its values is free again before the next.
    columns = {now: file.read(columns=[name])[name] for name, now in names.items()}
    return pa.table(columns, metadata=file.schema_arrow.metadata)


def _conform(table: pa.Table, location: str) -> pa.Table:
    """Bring a table made by anyone to `SCHEMA`, with `_ENCODED` columns encoded, or say which column can't be."""
    table = with_present_names(table)
    columns: dict[str, pa.ChunkedArray] = {}
    for field in SCHEMA:
        if field.name in table.column_names:
            columns[field.name] = _conform_column(table[field.name], field, location)
        elif field.nullable:
            columns[field.name] = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        else:
            raise ManifestError(f"{location}: the manifest has no column {field.name}; its type is {field.type}")
    return pa.table(columns).unify_dictionaries().combine_chunks()


def _conform_column(column: pa.ChunkedArray, field: pa.Field, location: str) -> pa.ChunkedArray:
    try:
        values = _cast_within_kind(column, field.type)
    except (pa.ArrowException, TypeError) as error:
        raise ManifestError(
            f"{location}: the manifest's column {field.name} is {column.type}, expected {field.type} ({error})"
        ) from error
    nulls = values.null_count
    if pa.types.is_list(field.type):
        nulls += sum(chunk.flatten().null_count for chunk in values.chunks)
    if nulls and not field.nullable:
        raise ManifestError(f"{location}: the manifest's column {field.name} has {nulls} nulls; it may have none")
    return values.dictionary_encode() if field.name in _ENCODED else values


def _cast_within_kind(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if column.type == wanted or (_is_text(wanted) and column.type == _ENCODED_TYPE):
        return column
    # Arrow would also turn numbers into text; only another width of the same kind is what the writer meant.
    if not (pa.types.is_null(column.type) or any(kind(column.type) and kind(wanted) for kind in _KINDS)):
        raise TypeError("another kind of value")
    return column.cast(wanted)


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)


def _is_integers(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


_KINDS = (_is_text, pa.types.is_integer, pa.types.is_floating, _is_integers)
_ENCODED = ["shard", "format"]
"""Columns of few values, kept in memory as indices into them."""
_ENCODED_TYPE = pa.dictionary(pa.int32(), pa.string())


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
