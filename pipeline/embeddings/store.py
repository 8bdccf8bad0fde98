"""A store of embeddings: one Parquet part a shard, `clip_id` → float16 `embedding`, each stamped with what made it.

`OUT/<shard stem>.parquet` holds a shard's rows in shard order, `OUT/embeddings.json` the stamp of the whole, and
`OUT/failed.parquet` the clips without an embedding, with reasons.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.parquet_files import publish_table
from pipeline.errors import PipelineError, UsageError
from pipeline.logits.store import FAILED_NAME, ClipFailure, part_stem
from pipeline.storage import files as storage

STAMP_NAME = "embeddings.json"
_SUFFIX = ".parquet"
_STAMP_KEY, _IDENTITY_KEY, _FAILURES_KEY = b"embedding_stamp", b"shard_identity", b"failures"
_FAILED_SCHEMA = pa.schema([(name, pa.string()) for name in ("part", "clip_id", "reason", "detail")])
_FAILURES = TypeAdapter(tuple[ClipFailure, ...])


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

    location: str
    clips: int
    stamp: EmbeddingStamp
    shard_identity: str
    failures: tuple[ClipFailure, ...]


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
    table = pa.table({"clip_id": pa.array(clip_ids, pa.string()), "embedding": values})
    publish_table(_part_of(out, shard), table.replace_schema_metadata(metadata), use_dictionary=False)


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
        storage.publish_bytes(storage.join_path(out, STAMP_NAME), stamp.to_json() + b"\n")
    storage.remove_staged(out)


def finished_parts(out: str, stamp: EmbeddingStamp, manifest: Manifest) -> dict[str, EmbeddingPart]:
    """Returns the parts, by shard, that `stamp` made of the bytes that the manifest knows."""
    there = {file.name for file in storage.list_files(out, _SUFFIX)}
    found = {}
    for shard in manifest.shards:
        if part_stem(shard) + _SUFFIX in there:
            part = read_part(_part_of(out, shard))
            if part.stamp == stamp and part.shard_identity == manifest.shard_identity(shard):
                found[shard] = part
    return found


def write_failures(out: str, parts: Mapping[str, EmbeddingPart]) -> None:
    """Gather the parts' failures in `failed.parquet`."""
    rows = [{"part": part_stem(shard), **asdict(one)} for shard, part in parts.items() for one in part.failures]
    publish_table(storage.join_path(out, FAILED_NAME), pa.Table.from_pylist(rows, schema=_FAILED_SCHEMA))


def read_part(location: str) -> EmbeddingPart:
    """Read the footer of a part.

    Raises:
        PipelineError: it is damaged, or is no part of such a store.
    """
    try:
        with storage.open_input(location) as stream, pq.ParquetFile(stream) as file:
            metadata, clips = file.schema_arrow.metadata or {}, file.metadata.num_rows
        return EmbeddingPart(
            location=location,
            clips=clips,
            stamp=_STAMP.validate_json(metadata[_STAMP_KEY]),
            shard_identity=metadata[_IDENTITY_KEY].decode(),
            failures=_FAILURES.validate_json(metadata[_FAILURES_KEY]),
        )
    except (pa.ArrowException, OSError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"{location}: no part of a store of embeddings ({reason}). Delete it, or move it"
        ) from error


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
    stamp = read_stamp(out)
    if stamp is None:
        raise PipelineError(
            f"{out}: no {STAMP_NAME}, so this is no store of embeddings; make one with `pipeline embed`"
        )
    ids: list[str] = []
    values = [np.empty((0, stamp.size), np.float16)]
    for file in storage.list_files(out, _SUFFIX):
        if file.name == FAILED_NAME:
            continue
        location = storage.join_path(out, file.name)
        if read_part(location).stamp != stamp:
            raise PipelineError(f"{location}: was made otherwise than {STAMP_NAME} says. Run `pipeline embed` again")
        with storage.open_input(location, whole=True) as stream:
            table = pq.read_table(stream).combine_chunks()
        ids += table["clip_id"].to_pylist()
        values += [chunk.flatten().to_numpy().reshape(-1, stamp.size) for chunk in table["embedding"].chunks]
    if not ids:
        raise PipelineError(f"{out}: holds no embedding yet; run `pipeline embed` to its end")
    return Embeddings(clip_ids=ids, values=np.concatenate(values), stamp=stamp)


def _part_of(out: str, shard: str) -> str:
    return storage.join_path(out, part_stem(shard) + _SUFFIX)
