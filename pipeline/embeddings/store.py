"""A store of embeddings: one Parquet part a shard, `clip_id` → float16 `embedding`, each stamped with what made it.

`OUT/<shard stem>.parquet` holds a shard's rows in shard order, `OUT/embeddings.json` the stamp of the whole, and
`OUT/failed.parquet` the clips without an embedding, with reasons.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.parquet_files import publish_table
from pipeline.errors import PipelineError, StorageUnavailableError, UsageError
from pipeline.logits.store import FAILED_NAME, ClipFailure, part_stem
from pipeline.storage import files as storage

STAMP_NAME = "embeddings.json"
_SUFFIX = ".parquet"
_STAMP_KEY, _IDENTITY_KEY, _FAILURES_KEY = b"embedding_stamp", b"shard_identity", b"failures"
_FAILED_SCHEMA = pa.schema([(name, pa.string()) for name in ("part", "clip_id", "reason", "detail")])
_FAILURES = TypeAdapter(tuple[ClipFailure, ...])

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingStamp:
    """What made a store's embeddings."""

    model: str
    """Registered name."""
    sha256: str
    """Of the weights."""
    front_end: str
    layers: str
    """As `--layer` names them."""
    size: int
    """Numbers a clip."""
    precision: str

    def to_json(self) -> bytes:
        """Returns the stamp as text that `_STAMP` reads."""
        return json.dumps(asdict(self)).encode()

    def differences_from(self, wanted: "EmbeddingStamp") -> str:
        """Returns in one line what differs from another stamp."""
        ours, theirs = asdict(self), asdict(wanted)
        return ", ".join(f"{key} {ours[key]} instead of {theirs[key]}" for key in ours if ours[key] != theirs[key])


_STAMP = TypeAdapter(EmbeddingStamp)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingPart:
    """One finished part, as its footer tells it."""

    file: storage.StoredFile
    clips: int
    """Clips with an embedding."""
    stamp: EmbeddingStamp
    shard_identity: str
    """`Manifest.shard_identity` of the shard that it was made from."""
    failures: tuple[ClipFailure, ...]

    @property
    def stem(self) -> str:
        """The shard's name without `.tar`."""
        return self.file.name.removesuffix(_SUFFIX)


def publish_part(
    out: str,
    shard: str,
    clip_ids: Sequence[str],
    embeddings: np.ndarray,
    stamp: EmbeddingStamp,
    shard_identity: str,
    failures: Sequence[ClipFailure],
) -> None:
    """Write one part; readers see all of it, its failures included, or none.

    Args:
        out: the store's folder or URL.
        shard: its name in the manifest.
        clip_ids: in shard order.
        embeddings: (clips, size), float16, finite.
        stamp: what made them.
        shard_identity: of the shard.
        failures: the shard's clips that have no embedding.
    """
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1), pa.float16()), stamp.size)
    metadata = {
        _STAMP_KEY: stamp.to_json(),
        _IDENTITY_KEY: shard_identity.encode(),
        _FAILURES_KEY: _FAILURES.dump_json(tuple(failures)),
    }
    table = pa.table([pa.array(clip_ids, pa.string()), values], schema=_columns(stamp))
    location = storage.join_path(out, part_stem(shard) + _SUFFIX)
    publish_table(location, table.replace_schema_metadata(metadata), use_dictionary=False)


def _columns(stamp: EmbeddingStamp) -> pa.Schema:
    return pa.schema([("clip_id", pa.string()), ("embedding", pa.list_(pa.float16(), stamp.size))])


def claim(out: str, stamp: EmbeddingStamp, *, overwrite: bool) -> None:
    """Make a folder ours: new, made alike, or emptied of what was made otherwise.

    Raises:
        UsageError: something else made it, and it may not be replaced.
        StorageError: nothing can be written there.
    """
    storage.check_writable(out)
    found = read_stamp(out)
    if found is not None and found != stamp:
        if not overwrite:
            raise UsageError(
                f"{out}: was made otherwise ({found.differences_from(stamp)}). Give another --out, the settings that "
                "it was made with, or --overwrite to replace it."
            )
        for file in storage.list_files(out, _SUFFIX):
            storage.remove(storage.join_path(out, file.name))
    if found != stamp:
        write_stamp(out, stamp)
    storage.remove_staged(out)


def write_stamp(out: str, stamp: EmbeddingStamp) -> None:
    """Write embeddings.json, before the first part."""
    storage.publish_bytes(storage.join_path(out, STAMP_NAME), stamp.to_json() + b"\n")


def finished_parts(out: str, stamp: EmbeddingStamp, manifest: Manifest) -> dict[str, EmbeddingPart]:
    """Returns the parts, by shard, that `stamp` made of the bytes that the manifest knows; damaged ones are told."""
    files = {file.name: file for file in part_files(out)}
    found = {}
    for shard in manifest.shards:
        if (file := files.get(part_stem(shard) + _SUFFIX)) is None:
            continue
        try:
            part = read_part(out, file)
        except StorageUnavailableError:
            raise
        except PipelineError as error:
            _log.warning("%s", error)
            continue
        if part.stamp == stamp and part.shard_identity == manifest.shard_identity(shard):
            found[shard] = part
    return found


def write_failures(out: str, parts: Iterable[EmbeddingPart]) -> None:
    """Gather the parts' failures in `failed.parquet`."""
    rows = [{"part": part.stem, **asdict(one)} for part in parts for one in part.failures]
    publish_table(storage.join_path(out, FAILED_NAME), pa.Table.from_pylist(rows, schema=_FAILED_SCHEMA))


def part_files(out: str) -> list[storage.StoredFile]:
    """Returns the files that should be parts, by name."""
    return [file for file in storage.list_files(out, _SUFFIX) if file.name != FAILED_NAME]


def read_part(out: str, file: storage.StoredFile) -> EmbeddingPart:
    """Read the footer of a part.

    Raises:
        PipelineError: it is damaged, or is no part of such a store.
    """
    location = storage.join_path(out, file.name)
    try:
        with storage.open_input(location) as stream, pq.ParquetFile(stream) as parquet:
            schema, clips = parquet.schema_arrow, parquet.metadata.num_rows
        metadata = schema.metadata or {}
        part = EmbeddingPart(
            file=file,
            clips=clips,
            stamp=_STAMP.validate_json(metadata[_STAMP_KEY]),
            shard_identity=metadata[_IDENTITY_KEY].decode(),
            failures=_FAILURES.validate_json(metadata[_FAILURES_KEY]),
        )
        if schema.names != ["clip_id", "embedding"] or schema.types != _columns(part.stamp).types:
            raise pa.ArrowInvalid(f"its columns are not those of embeddings of {part.stamp.size} numbers")
    except (pa.ArrowException, OSError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"{location}: no part of a store of embeddings ({reason}). Delete it and run `pipeline embed` again"
        ) from error
    return part


def holds_embeddings(out: str) -> bool:
    """Returns whether a folder has a part of embeddings that can be read, also where embeddings.json is lost."""
    for file in part_files(out):
        try:
            read_part(out, file)
        except StorageUnavailableError:
            raise
        except PipelineError:
            continue
        return True
    return False


def read_rows(out: str, part: EmbeddingPart) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Returns a part's clip ids, (clips,), and its embeddings, (clips, size), float16.

    Raises:
        PipelineError: the part is damaged.
    """
    table = _read(out, part, ["clip_id", "embedding"])
    flat = [chunk.flatten().to_numpy() for chunk in table["embedding"].chunks]
    values = np.concatenate([np.empty(0, np.float16), *flat])
    return table["clip_id"], values.reshape(len(table), part.stamp.size)


def read_ids(out: str, part: EmbeddingPart) -> pa.ChunkedArray:
    """Returns a part's clip ids alone; otherwise as `read_rows`."""
    return _read(out, part, ["clip_id"])["clip_id"]


def _read(out: str, part: EmbeddingPart, columns: list[str]) -> pa.Table:
    location = storage.join_path(out, part.file.name)
    try:
        with storage.open_input(location, whole=len(columns) > 1) as stream:
            return pq.read_table(stream, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{location}: damaged ({str(error).splitlines()[0]}). Run `pipeline verify`") from error


def read_stamp(out: str) -> EmbeddingStamp | None:
    """Read embeddings.json; None where there is none yet.

    Raises:
        PipelineError: it can't be read.
    """
    location = storage.join_path(out, STAMP_NAME)
    if not storage.exists(location):
        return None
    try:
        return _STAMP.validate_json(storage.read_bytes(location))
    except ValidationError as error:
        raise PipelineError(f"{location}: is no stamp of embeddings; move it away, or choose another folder") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """A whole store in memory."""

    clip_ids: list[str]
    values: np.ndarray
    """(clips, size), float16."""
    stamp: EmbeddingStamp


def read_embeddings(out: str) -> Embeddings:
    """Read a whole store.

    Raises:
        PipelineError: there is none, it is empty or damaged, or parts were made otherwise.
    """
    stamp, parts = open_embeddings(out)
    ids: list[str] = []
    values = [np.empty((0, stamp.size), np.float16)]
    for part in parts:
        some, vectors = read_rows(out, part)
        ids += some.to_pylist()
        values.append(vectors)
    if not ids:
        raise PipelineError(f"{out}: holds no embedding yet; run `pipeline embed` to its end")
    return Embeddings(clip_ids=ids, values=np.concatenate(values), stamp=stamp)


def open_embeddings(out: str) -> tuple[EmbeddingStamp, list[EmbeddingPart]]:
    """Returns a store's stamp and its parts' footers, by name.

    Raises:
        PipelineError: there is none, a part is damaged, or was made otherwise.
    """
    stamp = read_stamp(out)
    if stamp is None:
        raise PipelineError(
            f"{out}: no {STAMP_NAME}, so this is no store of embeddings; make one with `pipeline embed`"
        )
    parts = [read_part(out, file) for file in part_files(out)]
    for part in parts:
        if part.stamp != stamp:
            raise PipelineError(
                f"{storage.join_path(out, part.file.name)}: was made otherwise than {STAMP_NAME} says "
                f"({part.stamp.differences_from(stamp)}). Run `pipeline embed` again"
            )
    return stamp, parts
