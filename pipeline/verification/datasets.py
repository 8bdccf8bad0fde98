"""Reads a dataset again, tars and all, and compares it with its manifest."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from pipeline.dataset.audio import inspect_sound
from pipeline.dataset.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.errors import DecodeError, ManifestError, PipelineError, StorageUnavailableError
from pipeline.ingest.dataset_folder import UNFINISHED
from pipeline.ingest.descriptions import clip_id_of
from pipeline.ingest.file_marks import is_marked
from pipeline.ingest.rejections import UnusableClipError
from pipeline.ingest.tars import DAMAGED_SHARD, Sample, read_samples
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage
from pipeline.verification.faults import Advance, Fault, Findings

UNUSABLE_MANIFEST, MISSING_SHARD = "unusable manifest", "missing shard"
MISPLACED = ("outside the shard", "no sound at its place", "another clip's place", "another size", "another clip id")
"""Faults of the manifest: the sound itself may be sound."""
_OPUS_ROUNDING = 48
"""Samples at 48 kHz by which a length that was counted at a lower rate may differ: a few of that rate."""
OTHER_BYTES, UNDECODABLE, OTHER_LENGTH = "other bytes", "undecodable sound", "another length"


def verify_dataset(
    location: str, *, decode: bool, workers: int, on_manifest: Callable[[int], None], advance: Advance
) -> Findings:
    """Compare every clip of a dataset with its manifest.

    Args:
        location: the folder, a path or a URL.
        decode: also decode every clip from end to end.
        workers: shards read at the same time, at least 1.
        on_manifest: told how many clips there are.
        advance: told of each shard's clips once they are done.

    Raises:
        StorageUnavailableError: the server can't be reached.
        LostProcessError: reading a shard stands still.
    """
    findings = Findings()
    try:
        manifest = read_manifest(location)
    except ManifestError as error:
        findings.faults.append(Fault(UNUSABLE_MANIFEST, MANIFEST_NAME, detail=str(error)))
        return findings
    on_manifest(len(manifest))
    _look_around(manifest, findings)
    with Threads(workers, "verify") as threads:
        for shard, found in threads.map(partial(_verify_shard, manifest, decode=decode), manifest.shards):
            clips = len(manifest.rows_of_shard(shard))
            findings.looked_at.update({"shards": 1, "clips": clips})
            findings.faults.extend(found.faults)
            findings.notes.update(found.notes)
            advance(clips)
    return findings


def _look_around(manifest: Manifest, findings: Findings) -> None:
    if storage.exists(storage.join_path(manifest.location, UNFINISHED)):
        findings.notes["ingest that was stopped here"] += 1
    try:
        there = {file.name for file in storage.list_files(manifest.location, ".tar")}
    except PipelineError:  # a web server can't be asked
        return
    if strangers := there - set(manifest.shards):
        findings.notes["tars that the manifest does not name"] += len(strangers)


@dataclass(frozen=True, slots=True)
class _Row:
    """What the manifest says of a clip."""

    clip_id: str
    offset: int
    size: int
    format: str
    crc32: int | None
    sample_rate: int | None
    frames: int | None


def _verify_shard(manifest: Manifest, shard: str, *, decode: bool) -> Findings:
    findings = Findings()
    table = manifest.table.take(manifest.rows_of_shard(shard)).select(list(_Row.__slots__))
    rows = [_Row(**row) for row in table.to_pylist()]
    try:
        with storage.open_input(storage.join_path(manifest.location, shard), whole=True) as stream:
            _compare(stream, shard, rows, findings, decode=decode)
    except StorageUnavailableError:
        raise
    except (PipelineError, OSError) as error:
        findings.faults.append(Fault(MISSING_SHARD, shard, detail=f"{len(rows)} clips: {error}"))
    return findings


def _compare(stream: BinaryIO, shard: str, rows: list[_Row], findings: Findings, *, decode: bool) -> None:
    length = stream.seek(0, 2)
    samples, rejections = read_samples(stream, shard, checksums=False)
    for rejection in rejections:
        if rejection.reason == DAMAGED_SHARD:
            findings.faults.append(Fault(DAMAGED_SHARD, shard, detail=rejection.detail))
        else:
            findings.notes[f"tar members left out: {rejection.reason}"] += 1
    by_offset = {sample.audio.offset: sample for sample in samples if sample.audio}
    taken: set[int] = set()
    for row in rows:
        if fault := _misplaced(shard, row, by_offset.get(row.offset), length, taken):
            findings.faults.append(Fault(fault[0], shard, row.clip_id, fault[1]))
            continue
        taken.add(row.offset)
        stream.seek(row.offset)
        audio = stream.read(row.size)
        if row.crc32 is None:
            findings.notes["clips without a checksum"] += 1
        elif zlib.crc32(audio) != row.crc32:
            detail = f"{row.size} bytes at {row.offset} do not have the checksum {row.crc32:08x}"
            findings.faults.append(Fault(OTHER_BYTES, shard, row.clip_id, detail))
            continue
        if decode and (fault := _misheard(row, audio, findings)):
            findings.faults.append(Fault(fault[0], shard, row.clip_id, fault[1]))


def _misplaced(shard: str, row: _Row, sample: Sample | None, length: int, taken: set[int]) -> tuple[str, str] | None:
    if row.offset + row.size > length:
        return MISPLACED[0], f"{row.size} bytes at {row.offset}, but the shard has {length}"
    if sample is None or sample.audio is None:
        return MISPLACED[1], f"no member with a sound begins at {row.offset}"
    key = sample.key
    if row.offset in taken:
        return MISPLACED[2], f"an earlier row has {row.offset}, too"
    if (sample.audio.size, sample.format) != (row.size, row.format):
        return MISPLACED[3], f"{row.size} bytes of {row.format}, but {key} has {sample.audio.size} of {sample.format}"
    try:
        clip_id = clip_id_of(sample.description or {}, key)
    except UnusableClipError as error:
        return MISPLACED[4], f"{key}: {error.detail}"
    if clip_id == row.clip_id or is_marked(row.clip_id, shard, clip_id, sample.part):
        return None
    return MISPLACED[4], f"{key} is the clip {clip_id!r}"


def _misheard(row: _Row, audio: bytes, findings: Findings) -> tuple[str, str] | None:
    try:
        facts = inspect_sound(audio)
    except DecodeError as error:
        return UNDECODABLE, str(error)
    findings.notes.update(facts.notes)
    rate, frames = row.sample_rate or facts.sample_rate_hz, facts.frames if row.frames is None else row.frames
    if (rate, frames) == (facts.sample_rate_hz, facts.frames):
        return None
    if facts.format == "opus" and abs(frames * facts.sample_rate_hz / rate - facts.frames) < _OPUS_ROUNDING:
        findings.notes["Opus clips whose manifest has the rate that they were made from"] += 1
        return None
    found = f"{facts.frames} frames at {facts.sample_rate_hz} Hz"
    return OTHER_LENGTH, f"{found}, but the manifest says {(rate, frames)}"
