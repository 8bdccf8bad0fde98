"""WebDataset tars made by anyone → the rows of a manifest; no audio is decoded."""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.dataset.manifest import MAX_CLIP_BYTES
from pipeline.dataset.shards import AUDIO_FORMATS, UNREADABLE_FORMATS
from pipeline.dataset.string_columns import repeated_rows
from pipeline.dataset.tar_index import TarMember, iter_members
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary
from pipeline.errors import ShardError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger
from pipeline.ingest.descriptions import (
    MAX_BYTES,
    Description,
    clip_id_of,
    facts_of,
    has_labels,
    is_certain,
    label_fields,
    label_mask_of,
    labels_of,
    look_at_labels,
    parse_description,
)
from pipeline.ingest.file_marks import file_mark, marked
from pipeline.ingest.labels import LabelField
from pipeline.ingest.rejections import NOT_UTF8, Rejection, UnusableClipError, escaped
from pipeline.ingest.shared_names import told_apart
from pipeline.storage import files as storage

DAMAGED_SHARD = "damaged shard"
"""The reason that stands for a tar that could not be read to its end."""

_CHUNK_BYTES = 1 << 20

_FOUND_SCHEMA = pa.schema([*ROW_SCHEMA, pa.field("key", pa.string()), pa.field("unique_id", pa.string())])

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarRules:
    """How the members of a tar become clips."""

    vocabulary: Vocabulary
    checksums: bool = True
    """Read the audio to note its CRC-32; without, only headers and jsons are read."""
    keep_unlabelled: bool = False
    """Take clips whose json is missing or has no labels, as clips whose labels are unknown."""
    labels_known: bool = False
    """Take clips whose labels can't be read, too, without labels: who indexes knows them from elsewhere."""
    numbered: bool = True
    """Whether class numbers are places in the vocabulary: somebody said that it is the tars' own."""


@dataclass(slots=True)
class Sample:
    """The members of one tar that share a name up to the last dot."""

    key: str
    """That name."""
    part: int = 0
    """Which of the tars that were joined to one file it is in; 0 is the first."""
    audio: TarMember | None = None
    crc32: int | None = None
    description: Description | None = None
    spelled: bytes = b""
    """The description's json as it stands in the tar."""

    def checked_audio(self) -> TarMember:
        """Returns the audio member.

        Raises:
            UnusableClipError: there is none, or it can't be a sound.
        """
        if self.audio is None:
            raise UnusableClipError("json without audio")
        if self.format in UNREADABLE_FORMATS:
            raise UnusableClipError("unsupported format", self.format)
        if not 0 < self.audio.size <= MAX_CLIP_BYTES:
            raise UnusableClipError("empty file" if not self.audio.size else "too long", f"{self.audio.size} bytes")
        return self.audio

    @property
    def format(self) -> str:
        """The audio member's extension, lower case."""
        return self.audio.name.rpartition(".")[2].lower() if self.audio else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarClip:
    """One clip of a tar."""

    sample: Sample
    audio: TarMember
    clip_id: str
    unique_id: str | None
    """The id to take where another tar's clip has `clip_id`, too; None where that is more than a name."""
    labels: tuple[int, ...]
    label_mask: tuple[int, ...] | None
    facts: Mapping[str, int | float]
    """What is known of the sound itself; see `facts_of`."""


def is_tar(name: str) -> bool:
    """Returns whether a file is called like a tar. Compressed ones can't be read in place; they count, to be named."""
    return name.endswith((".tar", ".tgz")) or ".tar." in name


def is_named_list(beside: Vocabulary) -> bool:
    """Whether somebody named the class list that lies beside tars: AudioSet's is put there where nobody did."""
    return beside.sha256 != audioset_vocabulary().sha256


def read_samples(stream: BinaryIO, shard: str, *, checksums: bool) -> tuple[list[Sample], list[Rejection]]:
    """Group the members of one tar into samples, in the tar's order.

    A sample is the audio member and the json member that share a name up to the **last** dot, wherever in the tar they
    are; WebDataset itself ends the name at the first dot, where dotted names clash. Of two members with the same part
    in a sample the first is taken and the other rejected.

    Args:
        stream: a seekable stream of the tar.
        shard: what rejections call it.
        checksums: whether the audio is read for its CRC-32.
    """
    rejections: list[Rejection] = []
    samples: dict[tuple[int, str], Sample] = {}
    try:
        for member in iter_members(stream, shard):
            try:
                _collect(stream, member, samples, checksums)
            except UnusableClipError as error:
                rejections.append(Rejection(None, f"{shard}/{member.name}", error.reason, error.detail))
    except ShardError as error:
        _log.warning("%s", error)  # may stand for thousands of clips
        rejections.append(Rejection(None, shard, DAMAGED_SHARD, str(error)))
    return list(samples.values()), rejections


def index_tars(
    dataset: str, shards: Sequence[str], rules: TarRules, on_shard: Callable[[], None] = lambda: None
) -> Ledger:
    """Find the clips of tars: samples, as `read_samples` groups them.

    Of several with the same id the first is taken; what only has a name in common is told apart by its tar, see
    `told_apart`.

    Args:
        dataset: the folder, a path or a URL.
        shards: the tars' names in it.
        rules: how members become clips.
        on_shard: called after each tar.
    """
    tables, rejections = [_FOUND_SCHEMA.empty_table()], list[Rejection]()
    for shard in shards:
        rows, left_out = _rows_of(dataset, shard, rules)
        tables.append(pa.Table.from_pylist(rows, schema=_FOUND_SCHEMA))
        rejections += left_out
        on_shard()
    found = pa.concat_tables(tables).combine_chunks()
    ids = told_apart(found["clip_id"].combine_chunks(), found["unique_id"].combine_chunks())
    repeats = repeated_rows(ids)
    rows = found.set_column(0, _FOUND_SCHEMA.field("clip_id"), ids).select(ROW_SCHEMA.names)
    left_out = found.take(pa.array(repeats)).select(["shard", "key", "clip_id"]).to_pylist()
    repeated = [Rejection(None, f"{row['shard']}/{row['key']}", "repeated clip id", row["clip_id"]) for row in left_out]
    return Ledger(rows.take(pa.array(np.setdiff1d(np.arange(len(rows)), repeats))), [*repeated, *rejections])


def _rows_of(dataset: str, shard: str, rules: TarRules) -> tuple[list[dict[str, Any]], list[Rejection]]:
    """Returns what `_FOUND_SCHEMA` holds of one tar's clips, and what is left out."""
    if escaped(shard) != shard:
        return [], [Rejection(None, escaped(shard), NOT_UTF8)]
    with storage.open_input(storage.join_path(dataset, shard)) as stream:
        clips, rejections = read_clips(stream, shard, rules)
    rows = [
        {
            "clip_id": clip.clip_id,
            "shard": shard,
            "offset": clip.audio.offset,
            "size": clip.audio.size,
            "format": clip.sample.format,
            "labels": clip.labels,
            "crc32": clip.sample.crc32,
            "label_mask": clip.label_mask,
            "key": clip.sample.key,
            "unique_id": clip.unique_id,
            **clip.facts,
        }
        for clip in clips
    ]
    return rows, rejections


def read_clips(stream: BinaryIO, shard: str, rules: TarRules) -> tuple[list[TarClip], list[Rejection]]:
    """Find the clips of one tar by its headers and jsons.

    Args:
        stream: a seekable stream of the tar.
        shard: what rejections call it.
        rules: how members become clips.
    """
    samples, rejections = read_samples(stream, shard, checksums=rules.checksums)
    mark = file_mark(stream, shard)
    fields = label_fields(rules.vocabulary, numbered=rules.numbered)
    for sample in samples:
        look_at_labels(sample.description or {}, fields)
    clips: list[TarClip] = []
    for sample in samples:
        try:
            clips.append(_clip(sample, mark, fields, rules))
        except UnusableClipError as error:
            rejections.append(Rejection(None, f"{shard}/{sample.key}", error.reason, error.detail))
    return clips, rejections


def _clip(sample: Sample, mark: str, fields: Mapping[str, LabelField], rules: TarRules) -> TarClip:
    audio = sample.checked_audio()
    if sample.description is None and not rules.keep_unlabelled:
        raise UnusableClipError("audio without json")
    description, labels = sample.description or {}, ()
    nobody_knows = rules.keep_unlabelled and not has_labels(description)
    clip_id = clip_id_of(description, sample.key)
    try:
        labels = () if nobody_knows else labels_of(description, fields)
    except UnusableClipError:
        if not rules.labels_known:
            raise
    return TarClip(
        sample=sample,
        audio=audio,
        clip_id=clip_id,
        unique_id=None if is_certain(clip_id, description) else marked(mark, clip_id, sample.part),
        labels=labels,
        label_mask=() if nobody_knows and not rules.labels_known else label_mask_of(description, rules.vocabulary),
        facts=facts_of(description),
    )


def _collect(stream: BinaryIO, member: TarMember, samples: dict[tuple[int, str], Sample], checksums: bool) -> None:
    """Put a member where it belongs; members that are neither audio nor json are none of a clip's business."""
    if member.refusal:
        raise UnusableClipError(member.refusal)
    key, _, extension = member.name.removeprefix("./").rpartition(".")
    extension = extension.lower()
    if not key or extension not in {"json"} | AUDIO_FORMATS | UNREADABLE_FORMATS:
        return
    sample = samples.setdefault((member.part, key), Sample(key, member.part))
    if extension == "json":
        if sample.description is not None:
            raise UnusableClipError("repeated member")
        if member.size > MAX_BYTES:
            raise UnusableClipError("unreadable json", f"{member.size} bytes")
        stream.seek(member.offset)
        sample.spelled = stream.read(member.size)
        sample.description = parse_description(sample.spelled)
        return
    if sample.audio is not None:
        raise UnusableClipError("repeated member")
    sample.audio = member
    if checksums:
        sample.crc32 = _checksum(stream, member)


def _checksum(stream: BinaryIO, member: TarMember) -> int:
    checksum, left = 0, member.size
    stream.seek(member.offset)
    while left:
        chunk = stream.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise UnusableClipError(DAMAGED_SHARD, "the file became shorter while it was read")
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return checksum
