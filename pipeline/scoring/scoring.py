"""Scores checkpoints and logit stores on the same clips of a dataset, for every command that reports an mAP."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from pipeline.batches.join import (
    JoinedDataset,
    PaddedClips,
    TrainingBatch,
    batch_loader,
    check_reachable,
    scoring_batch,
)
from pipeline.dataset.manifest import Manifest
from pipeline.errors import ManifestError, TooManyFailuresError
from pipeline.logits.store import LogitStore
from pipeline.models.device import Precision, compute_in
from pipeline.models.hearing import AudioModel, model_input
from pipeline.models.loading import LoadedModel
from pipeline.models.weights import Task
from pipeline.redaction import redact
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.predictions import iter_predictions
from pipeline.scoring.report import EvaluationReport, SystemScores, hash_of_ids
from pipeline.scoring.tagging_metrics import ranking_scores
from pipeline.scoring.thresholds import ClassThresholds, best_thresholds
from pipeline.storage.mapped_arrays import scratch_array
from student import accuracy, bootstrap_mean_average_precision, d_prime, tagging_scores

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class System:
    """One thing to score, a checkpoint, an ensemble or a store, by what it says about a dataset's clips."""

    name: str
    source: str
    """The file, folder or members that it stands for."""
    sha256: str = ""
    """Hash of the checkpoint's bytes; empty for an ensemble or a store."""
    logits: np.ndarray
    """(clips, classes), floating point, in manifest order; anything at all in the rows that failed."""
    failures: Mapping[int, str]
    """Manifest row → why that clip has no logits."""
    task: Task = "multi-label"
    """What the logits are for: a sigmoid each, or one softmax."""


def run_models(
    models: Sequence[LoadedModel],
    manifest: Manifest,
    *,
    batch_size: int | None,
    workers: int | None,
    device: torch.device,
    precision: Precision,
    batches: Sequence[np.ndarray] | None = None,
) -> list[System]:
    """Run each model over a dataset; models of one rate and length share the decoding.

    Args:
        models: on `device`, of the dataset's classes.
        manifest: the dataset.
        batch_size: clips a forward pass, see `scoring_batch`.
        workers: decoding processes, see `loader_processes`; 0 decodes in this one.
        device: where the models are.
        precision: of the networks.
        batches: those of `scoring_batches` that are wanted; None is all. Nothing is said of the other rows.
    """
    compute_in(precision, [model.network for model in models])
    batches = scoring_batches(manifest, batch_size, device) if batches is None else batches
    systems: dict[int, System] = {}
    inputs = [model_input(cast("AudioModel", model.network)) for model in models]
    for shared in dict.fromkeys(inputs):
        sharing = [place for place, wanted in enumerate(inputs) if wanted == shared]
        dataset = JoinedDataset(manifest, **asdict(shared))
        loader = batch_loader(dataset, batches, workers=workers, device=device)
        failures: dict[int, str] = {}
        networks = [models[place].network for place in sharing]
        logits = [scratch_array((len(manifest), len(manifest.vocabulary)), np.float32) for _ in sharing]
        broken: list[dict[int, str]] = [{} for _ in sharing]
        title = f"scoring {', '.join(models[place].name for place in sharing)}"
        with progress_bar(title, sum(map(len, batches))) as bar:
            watched = _watch(loader, failures, bar, shared.sample_rate_hz)
            for found in iter_predictions(networks, watched, device=device, precision=precision):
                for target, faults, predicted in zip(logits, broken, found.logits, strict=True):
                    target[found.rows] = predicted
                    bad = found.rows[~np.isfinite(predicted).all(axis=1)].tolist()
                    faults.update(dict.fromkeys(bad, "non-finite logits"))
        for place, target, faults in zip(sharing, logits, broken, strict=True):
            model = models[place]
            systems[place] = System(
                name=model.name,
                source=model.source,
                sha256=model.sha256,
                logits=target,
                failures={**failures, **faults},
                task=model.task,
            )
    return [systems[place] for place in range(len(models))]


def scoring_batches(manifest: Manifest, batch_size: int | None, device: torch.device) -> list[np.ndarray]:
    """Returns the rows of each batch in which a dataset is scored, each (batch,) int64.

    A clip's logits can depend, in their last bits, on the batch that it is computed in.
    """
    size = scoring_batch(batch_size, device)
    return np.split(np.arange(len(manifest)), np.arange(size, len(manifest), size))


def _watch(
    batches: Iterable[TrainingBatch], failures: dict[int, str], bar: ProgressBar, sample_rate_hz: int
) -> Iterator[PaddedClips]:
    for batch in batches:
        check_reachable(batch.failures)
        failures.update((failure.row, failure.reason) for failure in batch.failures)
        yield from batch.divided(sample_rate_hz)
        bar.advance(len(batch))


def ensemble(members: Sequence[System]) -> System:
    """Average systems' logits; a clip that one member has no logits for has none."""
    logits = scratch_array(members[0].logits.shape, np.float32)
    for first in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        logits[rows] = np.mean([member.logits[rows] for member in members], axis=0)
    return System(
        name=f"ensemble of {len(members)}",
        source=" + ".join(member.source for member in members),
        logits=logits,
        failures={row: reason for member in members for row, reason in member.failures.items()},
        task="single-label" if all(member.task == "single-label" for member in members) else "multi-label",
    )


def read_members(store: LogitStore, manifest: Manifest) -> list[System]:
    """Returns each teacher of a store as a system of its own, where the store keeps the logits of each.

    Raises:
        LogitStoreError: as `read_store`.
    """
    if store.stamp.members is None or len(store.stamp.teachers) < 2:
        return []
    numbers = range(1, len(store.stamp.teachers) + 1)
    return [read_store(store, manifest, member=number) for number in numbers]


def read_store(store: LogitStore, manifest: Manifest, *, member: int | None = None) -> System:
    """Bring a store's logits, of the clips as they are, into the order of a dataset.

    Args:
        store: of any form.
        manifest: the dataset.
        member: the number, from 1, of the teacher whose own logits are wanted; None is the mean of all.

    Raises:
        LogitStoreError: the classes differ, no clip of the dataset has logits, or a part is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="aligned-") as folder:
        aligned = store.align(manifest, folder, member=member)  # mapped, and so still there when the folder is gone
    missing = np.flatnonzero(~aligned.has_logits)
    reasons = {failure.clip_id: failure.reason for part in store.parts for failure in part.failures}
    ids = manifest.clip_ids.take(pa.array(missing)).to_pylist()
    return System(
        name=_teachers_name(store) if member is None else store.stamp.teachers[member - 1].name,
        source=redact(store.location),
        logits=aligned.logits,
        failures={
            int(row): reasons.get(clip_id, "no logits in the store") for row, clip_id in zip(missing, ids, strict=True)
        },
    )


def _teachers_name(store: LogitStore) -> str:
    names = [teacher.name for teacher in store.stamp.teachers]
    if not names and store.stamp.imported is not None:
        return f"imported {store.stamp.imported.layout}"
    return " + ".join(names) if len(names) <= 3 else f"{len(names)} teachers"


def score(
    systems: Sequence[System], manifest: Manifest, *, max_failed: float, resampling: BootstrapConfig
) -> EvaluationReport:
    """Score systems on the clips that all of them have logits for, so that the metrics can be compared.

    Args:
        systems: at least one.
        manifest: the dataset that they were run on.
        max_failed: largest share of the dataset's clips, 0 to 1, that may be without logits.
        resampling: how often the clips are resampled, for intervals.

    Raises:
        TooManyFailuresError: more clips than that.
    """
    failures: dict[int, str] = {}
    for system in systems:
        failures.update({row: reason for row, reason in system.failures.items() if row not in failures})
    _check_share(failures, manifest, max_failed)
    rows = scored_rows(systems, manifest)
    everything = np.arange(len(manifest))
    labels = manifest.label_matrix(everything, dtype=bool)  # (clips, classes)
    label_mask = manifest.label_mask(everything)
    named = _with_unlike_names(systems)
    with _resampling_bar(resampling, len(named) * labels.shape[1]) as advance:
        scored = [_score_one(system, rows, labels, label_mask, resampling, advance) for system in named]
    return EvaluationReport(
        data=redact(manifest.location),
        clips=len(rows),
        clip_ids_sha256=hash_of_ids(manifest.clip_ids.take(pa.array(rows))),
        class_mids=tuple(label.mid for label in manifest.vocabulary.classes),
        class_names=manifest.vocabulary.names,
        positives=manifest.label_counts(rows),
        failures=tuple((manifest.clip_ids[row].as_py(), failures[row]) for row in sorted(failures)),
        systems=tuple(scored),
    )


def scored_rows(systems: Sequence[System], manifest: Manifest) -> np.ndarray:
    """Returns the rows of the clips that all systems have logits for, (clips,) int64, ascending."""
    failed = {row for system in systems for row in system.failures}
    return np.setdiff1d(np.arange(len(manifest)), np.fromiter(failed, np.int64, len(failed)))


def probabilities_of(system: System, rows: np.ndarray) -> np.ndarray:
    """Returns a system's probabilities at some rows, (rows, classes) float32, 0 to 1."""
    logits = torch.from_numpy(np.asarray(system.logits[rows])).float()
    return (logits.softmax(dim=1) if system.task == "single-label" else logits.sigmoid()).numpy()


def thresholds_of(system: System, manifest: Manifest) -> ClassThresholds:
    """Returns the thresholds that maximise a system's F1 in each class, on the clips that it has logits for."""
    rows = scored_rows([system], manifest)
    labels, mask = manifest.label_matrix(rows, dtype=bool), manifest.label_mask(rows)
    return best_thresholds(probabilities_of(system, rows), labels, mask)


def _check_share(failures: Mapping[int, str], manifest: Manifest, max_failed: float) -> None:
    clips = len(manifest)
    if clips and len(failures) < clips and len(failures) <= max_failed * clips:
        return
    if not failures:
        raise ManifestError(f"{manifest.location}: holds no clips, so there is nothing to score")
    reasons = Counter(failures.values()).most_common()
    row = min(failures)
    raise TooManyFailuresError(
        f"{len(failures)} of {clips} clips of {manifest.location} can't be scored "
        f"({100 * len(failures) / clips:.1f} %, limit {100 * max_failed:g} %): "
        f"{', '.join(f'{count} {reason}' for reason, count in reasons)}. The first is {manifest.clip_ids[row]}. "
        "Mend the dataset, complete the store, or allow more with --max-failed."
    )


@contextmanager
def _resampling_bar(resampling: BootstrapConfig, classes: int) -> Iterator[Callable[[int], None]]:
    """Show how many of all systems' classes are resampled; nothing where nothing is."""
    if not resampling.bootstrap:
        yield lambda classes: None
        return
    with progress_bar(f"{resampling.bootstrap:,} resamples", classes, unit="classes") as bar:
        yield bar.advance


def _score_one(
    system: System,
    rows: np.ndarray,
    labels: np.ndarray,
    label_mask: np.ndarray | None,
    resampling: BootstrapConfig,
    advance: Callable[[int], None],
) -> SystemScores:
    logits, accurate = ranking_scores(system.logits, system.task), None
    if system.task == "single-label":
        one_each = bool((labels[rows].sum(axis=1) == 1).all())
        accurate = accuracy(logits[rows], labels[rows]) if one_each else None
    scores = tagging_scores(logits, labels, rows, label_mask=label_mask)
    return SystemScores(
        name=system.name,
        source=system.source,
        sha256=system.sha256,
        mean_average_precision=scores.mean_average_precision,
        mean_roc_auc=scores.mean_roc_auc,
        d_prime=scores.mean_d_prime,
        average_precision=scores.average_precision,
        roc_auc=scores.roc_auc,
        class_d_prime=d_prime(scores.roc_auc),
        accuracy=accurate,
        replicates=bootstrap_mean_average_precision(
            logits,
            labels,
            rows,
            label_mask=label_mask,
            replicates=resampling.bootstrap,
            seed=resampling.seed,
            advance=advance,
        ),
    )


def _with_unlike_names(systems: Sequence[System]) -> list[System]:
    seen: Counter[str] = Counter()
    named = []
    for system in systems:
        seen[system.name] += 1
        times = seen[system.name]
        named.append(system if times == 1 else replace(system, name=f"{system.name} ({times})"))
    return named
