"""WebDataset tars made by anyone → the rows of a manifest; no audio is decoded."""

import logging
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.dataset.manifest import MAX_CLIP_BYTES
from pipeline.dataset.shards import AUDIO_FORMATS, UNREADABLE_FORMATS
from pipeline.dataset.tar_index import TarMember, iter_members
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ShardError
from pipeline.ingest.dataset_folder import ROW_SCHEMA, Ledger
from pipeline.ingest.descriptions import (
    MAX_BYTES,
    Description,
    clip_id_of,
    facts_of,
    label_mask_of,
    labels_of,
    parse_description,
)
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.storage import files as storage

DAMAGED_SHARD = "damaged shard"
"""The reason that stands for a tar that could not be read to its end."""

_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarRules:
    """How the members of a tar become clips."""

    vocabulary: Vocabulary
    checksums: bool = True
    """Read the audio to note its CRC-32; without, only headers and jsons are read."""
    keep_unlabelled: bool = False
    """Take clips whose json is missing or names no labels, without labels."""


@dataclass(slots=True)
class Sample:
    """The members of one tar that share a name up to the last dot."""

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


def is_tar(name: str) -> bool:
    """Returns whether a file is called like a tar. Compressed ones can't be read in place; they count, to be named."""
    return name.endswith((".tar", ".tgz")) or ".tar." in name


def read_samples(stream: BinaryIO, shard: str, *, checksums: bool) -> tuple[dict[str, Sample], list[Rejection]]:
    """Group the members of one tar into samples: name up to the last dot → sample, in the tar's order.

    A sample is the audio member and the json member that share a name up to the **last** dot, wherever in the tar they
    are; WebDataset itself ends the name at the first dot, where dotted names clash. Of two members with the same part
    in a sample the first is taken and the other rejected.

    Args:
        stream: a seekable stream of the tar.
        shard: what rejections call it.
        checksums: whether the audio is read for its CRC-32.
    """
    rejections: list[Rejection] = []
    samples: dict[str, Sample] = {}
    try:
        for member in iter_members(stream, shard):
            try:
                _collect(stream, member, samples, checksums)
            except UnusableClipError as error:
                rejections.append(Rejection(None, f"{shard}/{member.name}", error.reason, error.detail))
    except ShardError as error:
        _log.warning("%s", error)  # may stand for thousands of clips
        rejections.append(Rejection(None, shard, DAMAGED_SHARD, str(error)))
    return samples, rejections


def index_tar(dataset: str, shard: str, rules: TarRules, taken_ids: set[str]) -> Ledger:
    """Find the clips of one tar: samples, as `read_samples` groups them. Of two with the same id the first is taken.

    Args:
        dataset: the folder, a path or a URL.
        shard: the tar's name in it.
        rules: how members become clips.
        taken_ids: the ids of earlier shards; this shard's are added.
    """
    with storage.open_input(storage.join_path(dataset, shard)) as stream:
        samples, rejections = read_samples(stream, shard, checksums=rules.checksums)
    rows: list[dict[str, Any]] = []
    for key, sample in samples.items():
        try:
            rows.append({"shard": shard, **_row(key, sample, rules, taken_ids)})
        except UnusableClipError as error:
            rejections.append(Rejection(None, f"{shard}/{key}", error.reason, error.detail))
    return Ledger(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), rejections)


def _collect(stream: BinaryIO, member: TarMember, samples: dict[str, Sample], checksums: bool) -> None:
    """Put a member where it belongs; members that are neither audio nor json are none of a clip's business."""
    if member.refusal:
        raise UnusableClipError(member.refusal)
    key, _, extension = member.name.removeprefix("./").rpartition(".")
    extension = extension.lower()
    if not key or extension not in {"json"} | AUDIO_FORMATS | UNREADABLE_FORMATS:
        return
    sample = samples.setdefault(key, Sample())
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


def _row(key: str, sample: Sample, rules: TarRules, taken_ids: set[str]) -> dict[str, Any]:
    """Returns the manifest's columns of one clip, but for its shard."""
    audio = sample.checked_audio()
    if sample.description is None and not rules.keep_unlabelled:
        raise UnusableClipError("audio without json")
    description = sample.description or {}
    clip_id = clip_id_of(description, key)
    labels = labels_of(description, rules.vocabulary, may_lack=rules.keep_unlabelled)
    if clip_id in taken_ids:
        raise UnusableClipError("repeated clip id", clip_id)
    taken_ids.add(clip_id)
    return {
        "clip_id": clip_id,
        "offset": audio.offset,
        "size": audio.size,
        "format": sample.format,
        "labels": labels,
        "crc32": sample.crc32,
        "label_mask": label_mask_of(description, rules.vocabulary),
        **facts_of(description),
    }


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
