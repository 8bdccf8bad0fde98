"""Reads again a folder of stamped Parquet parts, one a shard, and moves aside what has to be made again."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.errors import PipelineError, StorageUnavailableError
from pipeline.logits.alignment import target_rows
from pipeline.logits.store import FAILED_NAME, part_stem
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage
from pipeline.storage.files import LISTING_NAME, StoredFile
from pipeline.verification.faults import Advance, Fault, Findings, move_aside
from pipeline.verification.inspection import Part, cover_shards

BAD_STAMP, OTHER_STAMP = "unusable stamp", "part made otherwise"
DAMAGED_PART, REPEATED_ID = "damaged part", "repeated clip id"
OTHER_CLASSES, CHANGED_SHARD = "other classes", "shard changed since"
STALE_FAILURES = "list of failed clips disagrees"


class _Stamp(Protocol):
    def to_json(self) -> bytes: ...

    def differences_from(self, wanted: Any, /) -> str: ...


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFormat(Generic[AnyPart]):
    """How parts of a kind are read and written, and what messages call what they hold."""

    holds: str
    """A plural, such as logits."""
    failed: str
    """What a note calls clips that have none, for a reason."""
    stamp_name: str
    command: str
    """What makes a part again."""
    read_stamp: Callable[[str], _Stamp | None]
    write_stamp: Callable[[str, Any], None]
    files: Callable[[str], list[StoredFile]]
    read_part: Callable[[str, StoredFile], AnyPart]
    read_ids: Callable[[str, AnyPart], pa.ChunkedArray]
    """A part's clip ids, each clip's once."""
    read_finite: Callable[[str, AnyPart], tuple[pa.ChunkedArray, np.ndarray]]
    """The ids with (clips,), bool: whether all numbers of a clip are finite."""
    write_failures: Callable[[str, Sequence[AnyPart]], None]
    check_classes: Callable[[str, Any, Manifest], None]
    """Refuses, by a PipelineError, a stamp whose classes are not a dataset's."""

    @property
    def not_finite(self) -> str:
        """The fault of a clip."""
        return f"{self.holds} that are not finite"

    @property
    def uncovered(self) -> str:
        """The fault of a shard."""
        return f"clips without {self.holds}"

    @property
    def to_make_again(self) -> tuple[str, ...]:
        """Faults of a part that `command` mends once the part is out of its way."""
        return (OTHER_STAMP, DAMAGED_PART, self.not_finite, REPEATED_ID)


def verify_parts(
    form: PartFormat[AnyPart],
    location: str,
    manifest: Manifest | None,
    *,
    workers: int,
    on_parts: Callable[[int], None],
    advance: Advance,
) -> Findings:
    """Read every part of a folder: stamps, ids, shapes, numbers; and what it has for a dataset.

    Args:
        form: of the parts.
        location: the folder, a path or a URL.
        manifest: of the dataset that the parts should cover; None asks for no coverage.
        workers: parts read at the same time, at least 1.
        on_parts: told how many parts there are.
        advance: told of each part that is done.

    Raises:
        StorageUnavailableError: the server can't be reached.
        LostProcessError: reading a part stands still.
    """
    findings = Findings()
    stamp = _stamp(form, location, findings)
    files = form.files(location)
    on_parts(len(files))
    sound: list[AnyPart] = []
    with Threads(workers, "verify") as threads:
        for _, (part, faults) in threads.map(
            lambda file: _verify_part(form, location, file, stamp), files, name=lambda file: file.name
        ):
            findings.looked_at["parts"] += 1
            findings.looked_at["clips"] += part.clips if part else 0
            findings.faults.extend(faults)
            if part is not None and not faults:
                sound.append(part)
            advance(1)
    _verify_failures(form, location, files, sound, findings)
    if stamp is not None:
        _verify_coverage(form, location, stamp, sound, manifest, findings)
    return findings


def _stamp(form: PartFormat[Any], location: str, findings: Findings) -> _Stamp | None:
    try:
        stamp = form.read_stamp(location)
    except StorageUnavailableError:
        raise
    except PipelineError as error:
        findings.faults.append(Fault(BAD_STAMP, form.stamp_name, detail=str(error)))
        return None
    if stamp is None:
        findings.faults.append(Fault(BAD_STAMP, form.stamp_name, detail="is not there"))
    return stamp


def _verify_part(
    form: PartFormat[AnyPart], location: str, file: StoredFile, stamp: _Stamp | None
) -> tuple[AnyPart | None, list[Fault]]:
    """Read one part; gives it where its footer can be read, and what is wrong with it."""
    try:
        part = form.read_part(location, file)
        faults = _content_faults(form, location, part)
    except StorageUnavailableError:
        raise
    except PipelineError as error:
        return None, [Fault(DAMAGED_PART, file.name, detail=str(error))]
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [Fault(DAMAGED_PART, file.name, detail=str(error).splitlines()[0])]
    if stamp is not None and part.stamp != stamp:
        faults.append(Fault(OTHER_STAMP, file.name, detail=part.stamp.differences_from(stamp)))
    return part, faults


def _content_faults(form: PartFormat[AnyPart], location: str, part: AnyPart) -> list[Fault]:
    column, is_finite = form.read_finite(location, part)
    ids = column.to_pylist()
    faults = [
        Fault(REPEATED_ID, part.file.name, clip_id, f"{count} times in one part")
        for clip_id, count in Counter(ids).items()
        if count > 1
    ]
    return faults + [Fault(form.not_finite, part.file.name, ids[row]) for row in np.flatnonzero(~is_finite)]


def _verify_failures(
    form: PartFormat[AnyPart], location: str, files: list[StoredFile], sound: list[AnyPart], findings: Findings
) -> None:
    """Compare failed.parquet, where it is there, with the parts, which it only repeats."""
    failures = sum(len(part.failures) for part in sound)
    findings.notes[form.failed] += failures
    if len(sound) < len(files):
        return  # it will be written again with the parts
    path = storage.join_path(location, FAILED_NAME)
    try:
        if not storage.exists(path):
            return
        with storage.open_input(path) as stream:
            listed = pq.read_table(stream).num_rows
        if listed != failures:
            detail = f"lists {listed} clips, but the parts tell of {failures}"
            findings.faults.append(Fault(STALE_FAILURES, FAILED_NAME, detail=detail))
    except (pa.ArrowException, OSError) as error:
        findings.faults.append(Fault(STALE_FAILURES, FAILED_NAME, detail=str(error).splitlines()[0]))


def _verify_coverage(
    form: PartFormat[AnyPart],
    location: str,
    stamp: _Stamp,
    parts: list[AnyPart],
    manifest: Manifest | None,
    findings: Findings,
) -> None:
    ids = pa.chunked_array([chunk for part in parts for chunk in form.read_ids(location, part).chunks], pa.string())
    _, repeated = target_rows(ids, ids.combine_chunks().unique())
    if repeated:
        findings.notes["clips in several parts, of which the first counts"] += repeated
    if manifest is None:
        return
    try:
        form.check_classes(location, stamp, manifest)
    except PipelineError as error:
        findings.faults.append(Fault(OTHER_CLASSES, form.stamp_name, detail=str(error)))
        return
    coverage = cover_shards(ids, parts, manifest)
    failed = {failure.clip_id for part in parts for failure in part.failures}
    known = set(ids.to_pylist()) | failed if coverage.uncovered_shards else set()
    for shard, count in coverage.uncovered_shards.items():
        rows = manifest.rows_of_shard(shard)
        missing = [clip_id for clip_id in manifest.clip_ids.take(pa.array(rows)).to_pylist() if clip_id not in known]
        if missing:
            detail = f"{len(missing)} of {len(rows)}, such as {missing[0]}; {count - len(missing)} more failed"
            findings.faults.append(Fault(form.uncovered, shard, detail=detail))
    _verify_sources(form, location, parts, manifest, coverage.changed_shards, findings)


def _verify_sources(
    form: PartFormat[AnyPart],
    location: str,
    parts: list[AnyPart],
    manifest: Manifest,
    changed: tuple[str, ...],
    findings: Findings,
) -> None:
    """Tell a shard whose sounds have changed from one that only shares its name with what a part was made from."""
    by_stem = {part.stem: part for part in parts}
    for shard in changed:
        part = by_stem[part_stem(shard)]
        ids = manifest.clip_ids.take(pa.array(manifest.rows_of_shard(shard))).to_pylist()
        made_from = {
            *form.read_ids(location, part).to_pylist(),
            *(failure.clip_id for failure in part.failures),
        }
        if set(ids) == made_from:
            detail = f"{part.file.name} was made from other bytes, or the clips in another order"
            findings.faults.append(Fault(CHANGED_SHARD, shard, detail=detail))
        else:
            findings.notes["shards that are cut otherwise than the store's parts"] += 1


def repair_parts(form: PartFormat[Any], location: str, findings: Findings) -> None:
    """Move bad parts into `.damaged`, so that their command makes them again; write lists anew.

    A stamp that can't be read is written again where all sound parts bear the same one.
    """
    for name in dict.fromkeys(fault.file for fault in findings.faults if fault.check in form.to_make_again):
        target = move_aside(location, name)
        for fault in findings.faults:
            if fault.file == name:
                fault.repair = f"moved to {target}; `{form.command}` makes it again"
    parts = [form.read_part(location, file) for file in form.files(location)]
    stamps = {part.stamp.to_json() for part in parts}
    for fault in findings.faults:
        if fault.check == BAD_STAMP and len(stamps) == 1:
            if storage.exists(storage.join_path(location, form.stamp_name)):
                move_aside(location, form.stamp_name)
            form.write_stamp(location, parts[0].stamp)
            fault.repair = f"written again from the {len(parts)} parts, which agree"
        elif fault.check == STALE_FAILURES:
            form.write_failures(location, parts)
            fault.repair = "written again from the parts"
    if storage.exists(storage.join_path(location, LISTING_NAME)) and any(fault.repair for fault in findings.faults):
        storage.write_listing(location)
