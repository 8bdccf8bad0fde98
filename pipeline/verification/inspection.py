"""What a dataset, a store or a run holds, in numbers: read from manifests, footers and logs, no sound is decoded."""

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.errors import ManifestError, PipelineError
from pipeline.ingest.rejections import REJECTED_NAME
from pipeline.logits.alignment import target_rows
from pipeline.logits.store import ClipFailure, LogitStore, part_stem
from pipeline.runtime.progress import METRICS_NAME, read_metrics
from pipeline.storage import files as storage
from pipeline.storage.files import StoredFile
from pipeline.training.checkpoints import CHECKPOINTS_FOLDER
from pipeline.training.folder import CONFIG_NAME, SUMMARY_NAME

MAP_NAME, ACCURACY_NAME = "eval/mAP", "eval/accuracy"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """A dataset in numbers."""

    clips: int
    shards: int
    missing_shards: tuple[str, ...]
    """Shards that the manifest names and the folder lacks."""
    shard_bytes: int
    """Size of the tars that are there."""
    audio_bytes: int
    """Size of the clips' encoded audio."""
    seconds: float
    """Length of the clips whose length is known."""
    clips_of_known_length: int
    formats: dict[str, int]
    """Extension → clips, the most frequent first."""
    sample_rates_hz: dict[int, int]
    """Sample rate → clips, the most frequent first; clips whose rate isn't known are left out."""
    label_counts: np.ndarray
    """(classes,), int64: clips that carry each class."""
    clips_without_labels: int
    """Those on which none of the classes is to be heard."""
    clips_of_unknown_labels: int
    vocabulary_sha256: str
    rejected: dict[str, int]
    """Reason → files that didn't become clips, the most frequent first."""


class Part(Protocol):
    """A stamped Parquet part of a store, of logits or of embeddings, as its footer tells it."""

    @property
    def file(self) -> StoredFile: ...

    @property
    def stem(self) -> str: ...

    @property
    def clips(self) -> int: ...

    @property
    def stamp(self) -> Any: ...

    @property
    def shard_identity(self) -> str: ...

    @property
    def failures(self) -> tuple[ClipFailure, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of a dataset a store knows."""

    clips: int
    """Clips of the dataset."""
    covered_clips: int
    """Those that the store has logits, or embeddings, of."""
    uncovered_shards: dict[str, int]
    """Shard → its clips that the store lacks, in shard order; shards that are covered whole are left out."""
    changed_shards: tuple[str, ...]
    """Shards that are no longer what their part was made from."""


def summarise_dataset(manifest: Manifest) -> DatasetSummary:
    """Count what a dataset holds.

    Raises:
        ManifestError: its list of rejected files can't be read.
    """
    sizes = {file.name: file.size for file in storage.find_files(manifest.location, manifest.shards)}
    seconds = _seconds(manifest.table)  # (clips,), NaN where not known
    known = np.isfinite(seconds)
    indptr, _ = manifest.labels_csr
    return DatasetSummary(
        clips=len(manifest),
        shards=len(manifest.shards),
        missing_shards=tuple(shard for shard in manifest.shards if not _is_there(manifest.location, shard, sizes)),
        shard_bytes=sum(sizes.get(shard, 0) for shard in manifest.shards),
        audio_bytes=int(manifest.sizes.sum()),
        seconds=float(seconds[known].sum()),
        clips_of_known_length=int(known.sum()),
        formats=_counts(manifest.formats),
        sample_rates_hz=_counts(manifest.table["sample_rate"]),
        label_counts=manifest.label_counts(),
        clips_without_labels=int(((np.diff(indptr) == 0) & ~manifest.unlabelled).sum()),
        clips_of_unknown_labels=int(manifest.unlabelled.sum()),
        vocabulary_sha256=manifest.vocabulary.sha256,
        rejected=_rejected(manifest.location),
    )


def _seconds(table: pa.Table) -> np.ndarray:
    """Returns (clips,) float64: the file's own length where it is known, else the segment's, else NaN."""
    known = ("frames", "sample_rate", "start_seconds", "end_seconds")
    frames, rate, start, end = (pc.cast(table[name], pa.float64()).to_numpy() for name in known)  # NaN for null
    return np.where(np.isfinite(frames) & (rate > 0), frames / np.where(rate > 0, rate, 1), end - start)


def _is_there(location: str, shard: str, sizes: dict[str, int]) -> bool:
    # Only shards in folders below the dataset's own are not in its listing.
    return shard in sizes or ("/" in shard and storage.exists(storage.join_path(location, shard)))


def _counts(column: pa.Array | pa.ChunkedArray) -> dict:
    counted = Counter({one["values"]: one["counts"] for one in column.drop_null().value_counts().to_pylist()})
    return dict(counted.most_common())


def _rejected(location: str) -> dict[str, int]:
    path = storage.join_path(location, REJECTED_NAME)
    if not storage.exists(path):
        return {}
    try:
        with storage.open_input(path) as stream:
            return _counts(pq.read_table(stream, columns=["reason"])["reason"])
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ManifestError(f"{path}: not a readable list of rejected files ({str(error).splitlines()[0]})") from error


def cover(store: LogitStore, manifest: Manifest) -> Coverage:
    """Find which clips of a dataset have logits in a store, by clip id.

    Raises:
        LogitStoreError: the store's classes are not the dataset's.
    """
    store.check_vocabulary(manifest.vocabulary, manifest.location)
    return cover_shards(store.clip_ids(), store.parts, manifest)


def cover_shards(clip_ids: pa.ChunkedArray, parts: Iterable[Part], manifest: Manifest) -> Coverage:
    """Find which clips of a dataset some parts hold, and which shards are no longer what they were made from.

    Args:
        clip_ids: of all parts.
        parts: their footers.
        manifest: the dataset.
    """
    rows, _ = target_rows(clip_ids, manifest.clip_ids)  # (store rows,)
    is_covered = np.zeros(len(manifest), bool)
    is_covered[rows[rows >= 0]] = True
    missing = np.bincount(manifest.shard_of_clip[~is_covered], minlength=len(manifest.shards))  # (shards,)
    identities = {part.stem: part.shard_identity for part in parts}
    return Coverage(
        clips=len(manifest),
        covered_clips=int(is_covered.sum()),
        uncovered_shards={
            shard: int(count) for shard, count in zip(manifest.shards, missing, strict=True) if count > 0
        },
        changed_shards=tuple(
            shard
            for shard in manifest.shards
            if (made_from := identities.get(part_stem(shard))) and made_from != manifest.shard_identity(shard)
        ),
    )


def failures_by_reason(parts: Sequence[Part]) -> dict[str, int]:
    """Count the clips that were tried and that the parts have nothing of, the most frequent reason first."""
    reasons: Iterable[str] = (failure.reason for part in parts for failure in part.failures)
    return dict(Counter(reasons).most_common())


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How far a training run got, and what it keeps."""

    settings: dict[str, Any]
    """The resolved configuration; empty where the run has none yet."""
    last_metrics: dict[str, float]
    """Name → latest value of every metric in the log, `step` and `epoch` included."""
    best_map: float | None
    """Best mAP on the evaluation clips, 0 to 1; None where nothing was evaluated yet."""
    best_epoch: int | None
    """The epoch, from 0, that it was reached in."""
    best_accuracy: float | None
    """Best accuracy on the evaluation clips, 0 to 1; None where clips may have several classes."""
    best_accuracy_epoch: int | None
    """The epoch, from 0, that it was reached in."""
    files: dict[str, int]
    """Checkpoint or file of weights → bytes, in the order of their names."""
    measure: str
    """The metric that `rounds` are compared by, such as accuracy; empty where the run has no rounds."""
    rounds: dict[str, float]
    """Round, such as fold1, of `pipeline finetune` → its measure, 0 to 1; those that are done."""


def summarise_run(run: str | Path) -> RunSummary:
    """Read how a run went from its settings, its log and its files.

    Raises:
        PipelineError: its settings or its log can't be read.
    """
    location = storage.join_path(run, CONFIG_NAME)
    try:
        settings = tomllib.loads(storage.read_bytes(location).decode()) if storage.exists(location) else {}
        lines = read_metrics(run)
        told = storage.join_path(run, SUMMARY_NAME)
        summary: dict[str, Any] = json.loads(storage.read_bytes(told)) if storage.exists(told) else {}
    except ValueError as error:
        raise PipelineError(f"{run}: {CONFIG_NAME}, {METRICS_NAME} or {SUMMARY_NAME} is damaged ({error})") from error
    best_map, best_epoch = _best(lines, MAP_NAME)
    best_accuracy, best_accuracy_epoch = _best(lines, ACCURACY_NAME)
    checkpoints = storage.list_files(storage.join_path(run, CHECKPOINTS_FOLDER), ".pt")
    files = {f"{CHECKPOINTS_FOLDER}/{file.name}": file.size for file in checkpoints}
    files |= {file.name: file.size for file in storage.list_files(run, ".safetensors")}
    return RunSummary(
        settings=settings,
        last_metrics={name: value for line in lines for name, value in line.items()},
        best_map=best_map,
        best_epoch=best_epoch,
        best_accuracy=best_accuracy,
        best_accuracy_epoch=best_accuracy_epoch,
        files=files,
        measure=summary.get("measure", ""),
        rounds={name: metrics[summary["measure"]] for name, metrics in summary.get("rounds", {}).items()},
    )


def _best(lines: Iterable[Mapping[str, float]], name: str) -> tuple[float | None, int | None]:
    """Returns the highest value that a metric had, and the first epoch that had it."""
    best = max((line for line in lines if name in line), key=lambda line: line[name], default=None)
    return (None, None) if best is None else (best[name], int(best["epoch"]))
