"""The clips of finished datasets: copied, not decoded, with all that is known of them.

A split, a join and another shard size are all this source with another choice of clips. They copy, because a manifest
names shards inside its own folder: a second manifest over the same tars could only be a folder of links, which object
stores don't know, and whose tars would give plain `webdataset` the clips of the other side, too.
"""

import json
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import DecodeError, ShardError, UsageError
from pipeline.ingest.descriptions import (
    LABEL_FIELDS,
    MASK_FIELDS,
    facts_of,
    label_fields,
    label_mask_of,
    labels_of,
    look_at_labels,
)
from pipeline.ingest.file_ranges import FileRanges
from pipeline.ingest.rejections import Rejection, UnusableClipError
from pipeline.ingest.sources import (
    ClipReader,
    KnownSound,
    PlannedClip,
    ReadHandle,
    Source,
    facts_to_tell,
    from_folder,
)
from pipeline.ingest.tars import Sample, read_samples
from pipeline.storage import files as storage

_ROWS_AT_ONCE = 1 << 12
_KNOWN_SHARDS = 64
"""Shards whose jsons are kept; each takes about a megabyte."""

Choice = Callable[[Manifest], np.ndarray]
"""Tells of each clip of a manifest whether it is wanted: (clips,) bool. Pickled with its source."""


@dataclass(frozen=True, slots=True)
class FinishedDatasets(Source):
    """The clips of datasets, in their order; of several with one id the first dataset's is taken."""

    datasets: tuple[str, ...]
    """Folders, local or URLs."""
    vocabulary: Vocabulary
    """The classes that the copies' labels point into."""
    choice: Choice | None = None
    """Which clips; None is all."""
    working_folder: str = field(default_factory=lambda: str(Path.cwd()))
    """What paths that aren't absolute are relative to."""

    def own_vocabulary(self) -> Vocabulary:
        """Returns the classes that the copies' labels point into."""
        return self.vocabulary

    def scan(self, vocabulary: Vocabulary, notes: Counter[str]) -> Iterator[PlannedClip | Rejection]:
        """Go through the manifests.

        Raises:
            ManifestError: a manifest is missing or malformed.
            ShardError: a shard that a manifest names is missing.
        """
        for dataset in self.datasets:
            manifest = read_manifest(dataset)
            versions = _versions(manifest)
            index_of = _renumbering(manifest.vocabulary, vocabulary)
            chosen = np.flatnonzero(self.choice(manifest)) if self.choice else np.arange(len(manifest))
            for start in range(0, len(chosen), _ROWS_AT_ONCE):
                rows = manifest.table.take(chosen[start : start + _ROWS_AT_ONCE])
                for row in rows.to_pylist():
                    yield _planned(dataset, row, versions[row["shard"]], index_of)

    def open_reader(self) -> AbstractContextManager[ClipReader]:
        """Open the shards, each with its first clip."""
        return _open_reader(self.working_folder, self.vocabulary)


def joined_vocabulary(vocabularies: Sequence[tuple[str, Vocabulary]]) -> Vocabulary:
    """Join class lists: the first one as it is, so that stores made for it fit, then what each other one adds.

    Args:
        vocabularies: what messages call them, and the lists.

    Raises:
        UsageError: two lists have a class of the same name under different mids, or together they are too long.
    """
    first, joined = vocabularies[0][1], list(vocabularies[0][1].classes)
    known = set(first.index_by_mid)
    mids_of_name = {label.name: label.mid for label in joined}
    for where, vocabulary in vocabularies[1:]:
        for label in vocabulary.classes:
            if label.mid in known:
                continue
            if label.name in mids_of_name:
                raise UsageError(
                    f"{where}: its class {label.name!r} is {label.mid!r}, but {mids_of_name[label.name]!r} in an "
                    "earlier dataset. Give both the same class list first, or name the one to use with --classes"
                )
            known.add(label.mid)
            joined.append(LabelClass(len(joined), label.mid, label.name))
        mids_of_name |= {label.name: label.mid for label in joined}
    return first if len(joined) == len(first) else Vocabulary(tuple(joined))


def _renumbering(old: Vocabulary, new: Vocabulary) -> dict[int, int | None]:
    """Returns old class index → new one, by mid, else by name; None where the new list has no such class."""
    if old.sha256 == new.sha256:
        return {index: index for index in range(len(old))}
    return {label.index: new.index_by_mid.get(label.mid, new.index_by_name.get(label.name)) for label in old.classes}


def _versions(manifest: Manifest) -> dict[str, str]:
    """Returns shard → what changes when it does.

    Raises:
        ShardError: a shard is missing.
    """
    found = {
        file.name: f"{file.size} {file.version}" for file in storage.find_files(manifest.location, manifest.shards)
    }
    for shard in manifest.shards:
        if shard not in found and "/" in shard and storage.exists(storage.join_path(manifest.location, shard)):
            found[shard] = ""  # in a folder below, which the listing does not tell of
    missing = [shard for shard in manifest.shards if shard not in found]
    if missing:
        raise ShardError(
            f"{manifest.location}: {len(missing)} shards that its manifest names are missing, such as {missing[0]}. "
            f"Put them back, or run `pipeline index {manifest.location}` to go on without their clips"
        )
    return found


def _planned(
    dataset: str, row: dict[str, Any], version: str, index_of: dict[int, int | None]
) -> PlannedClip | Rejection:
    shard = storage.join_path(dataset, row["shard"])
    labels = [index_of[label] for label in row["labels"]]
    if None in labels:
        return Rejection(row["clip_id"], f"{shard}/{row['clip_id']}", "unknown label")
    known = None if row["label_mask"] is None else [index_of[label] for label in row["label_mask"]]
    return PlannedClip(
        clip_id=row["clip_id"],
        file=shard,
        version=version,
        labels=tuple(sorted({label for label in labels if label is not None})),
        member=row["clip_id"],
        position=row["offset"],
        size=row["size"],
        label_mask=None if known is None else tuple(sorted(label for label in known if label is not None)),
        **{name: row[name] for name in ("start_seconds", "end_seconds", "format", "sample_rate", "frames", "crc32")},
    )


@contextmanager
def _open_reader(working_folder: str, vocabulary: Vocabulary) -> Iterator[ClipReader]:
    ranges = FileRanges(working_folder)
    samples: OrderedDict[str, dict[int, Sample]] = OrderedDict()

    def handles(clips: Sequence[PlannedClip]) -> Iterator[ReadHandle]:
        for clip in clips:
            if clip.file not in samples:
                samples[clip.file] = _samples_by_offset(from_folder(working_folder, clip.file))
                if len(samples) > _KNOWN_SHARDS:
                    samples.popitem(last=False)
            samples.move_to_end(clip.file)
            yield partial(_read, ranges, clip, samples[clip.file].get(clip.position), vocabulary)

    yield handles


def _samples_by_offset(location: str) -> dict[int, Sample]:
    with storage.open_input(location) as stream:
        samples, _ = read_samples(stream, location, checksums=False)
    return {sample.audio.offset: sample for sample in samples if sample.audio}


def _read(ranges: FileRanges, clip: PlannedClip, sample: Sample | None, vocabulary: Vocabulary) -> KnownSound:
    size = clip.size or 0
    audio = ranges.read(clip.file, clip.position, size)
    if len(audio) < size or (clip.crc32 is not None and zlib.crc32(audio) != clip.crc32):
        raise DecodeError("other bytes than the manifest's", f"{size} bytes at {clip.position}")
    return KnownSound(audio, _description(clip, sample, vocabulary))


def _description(clip: PlannedClip, sample: Sample | None, vocabulary: Vocabulary) -> bytes:
    """Returns the clip's json as it stands where it says what the manifest says, else with what it lacks."""
    found = (sample.description if sample else None) or {}
    told = facts_to_tell(clip, vocabulary, clip.sample_rate, clip.frames)
    facts = {name: value for name, value in told.items() if name not in ("labels", *MASK_FIELDS)}
    try:
        fields = label_fields(vocabulary, numbered=True)
        look_at_labels(found, fields)
        says_all = found.get("clip_id") == clip.clip_id and labels_of(found, fields) == clip.labels
        says_all = says_all and label_mask_of(found, vocabulary) == clip.label_mask
    except UnusableClipError:
        says_all = False
    if sample and says_all and _rounded(facts_of(found)) == _rounded(facts):
        return sample.spelled
    replaced = {"clip_id", *LABEL_FIELDS, *MASK_FIELDS, "sample_rate", "frames", "start_seconds", "end_seconds"}
    others = {name: value for name, value in found.items() if name not in replaced}
    return json.dumps({"clip_id": clip.clip_id, **told, **others}, ensure_ascii=False).encode()


def _rounded(facts: dict[str, Any]) -> dict[str, Any]:
    # The manifest keeps times as float32.
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in facts.items()}
