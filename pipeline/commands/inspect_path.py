"""`pipeline inspect`: what a dataset, a store of logits or embeddings or a run holds, and how much a store covers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.views import ViewsStamp
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.embeddings.store import EmbeddingPart, EmbeddingStamp, open_embeddings, read_ids
from pipeline.errors import UsageError
from pipeline.logits.stamp import ImportStamp
from pipeline.logits.store import LogitStore, open_store
from pipeline.redaction import redact
from pipeline.runtime.output import print_line, print_table
from pipeline.verification.folder_kinds import kind_of
from pipeline.verification.inspection import (
    Coverage,
    DatasetSummary,
    RunSummary,
    cover,
    cover_shards,
    failures_by_reason,
    summarise_dataset,
    summarise_run,
)

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """What to look at."""

    path: str
    """A dataset, a logit store, embeddings or a run: a folder, or the URL of one."""
    _: KW_ONLY
    data: str | None = None
    """With a store or embeddings: the dataset that they should cover."""


def run(config: Annotated[InspectConfig, Parameter(name="*")]) -> None:
    """Show what a dataset, a logit store, a folder of embeddings or a run holds, without decoding a sound.

    Raises:
        PipelineError: PATH is none of these, or is damaged.
    """
    kind = kind_of(config.path)
    if config.data is not None and kind not in ("store", "embeddings"):
        raise UsageError(f"--data asks how much of a dataset a store covers, but {config.path} is a {kind}")
    if kind == "dataset":
        manifest = read_manifest(config.path)
        _show_dataset(manifest, summarise_dataset(manifest))
    elif kind == "store":
        store = open_store(config.path)
        _show_store(store)
        if config.data is not None:
            _show_coverage(config.data, "logits", cover(store, read_manifest(config.data)))
    elif kind == "embeddings":
        stamp, parts = open_embeddings(config.path)
        _show_embeddings(config.path, stamp, parts)
        if config.data is not None:
            chunks = [chunk for part in parts for chunk in read_ids(config.path, part).chunks]
            covered = cover_shards(pa.chunked_array(chunks, pa.string()), parts, read_manifest(config.data))
            _show_coverage(config.data, "embeddings", covered)
    else:
        _show_run(config.path, summarise_run(config.path))


def _show_dataset(manifest: Manifest, summary: DatasetSummary) -> None:
    counts = summary.label_counts
    present = int((counts > 0).sum())
    rows = {
        "clips": f"{summary.clips:,}",
        "shards": f"{summary.shards:,}, {_megabytes(summary.shard_bytes)}",
        "missing shards": _few(summary.missing_shards),
        "audio": f"{_megabytes(summary.audio_bytes)} encoded: {_tally(summary.formats)}",
        "sample rates": _tally({f"{rate:,} Hz": clips for rate, clips in summary.sample_rates_hz.items()}),
        "length": _length(summary),
        "classes": f"{present} of {len(counts)} present, {counts.sum() / max(summary.clips, 1):.2f} labels a clip",
        "without labels": f"{summary.clips_without_labels:,} clips" if summary.clips_without_labels else "",
        "labels unknown": f"{summary.clips_of_unknown_labels:,} clips" if summary.clips_of_unknown_labels else "",
        "most frequent": _classes(manifest.vocabulary, counts, rarest=False),
        "least frequent": _classes(manifest.vocabulary, counts, rarest=True),
        "vocabulary sha256": summary.vocabulary_sha256,
        "rejected files": _tally(summary.rejected),
    }
    _show(f"dataset {manifest.location}", rows)


def _length(summary: DatasetSummary) -> str:
    if not summary.clips_of_known_length:
        return ""
    hours = f"{summary.seconds / 3600:.2f} hours, {summary.seconds / summary.clips_of_known_length:.1f} s a clip"
    unknown = summary.clips - summary.clips_of_known_length
    return f"{hours}; not known of {unknown:,} clips" if unknown else hours


def _classes(vocabulary: Vocabulary, counts: np.ndarray, *, rarest: bool) -> str:
    present = np.flatnonzero(counts)
    order = present[np.argsort(counts[present] if rarest else -counts[present], kind="stable")]
    return " · ".join(f"{vocabulary.names[index]} {counts[index]:,}" for index in order[:_MAX_SHOWN])


def _show_store(store: LogitStore) -> None:
    stamp = store.stamp
    failures = failures_by_reason(store.parts)
    rows = {
        "clips": f"{store.clip_count:,} in {len(store.parts):,} parts, {_megabytes(store.size)}",
        "space": f"{store.size / store.clip_count:,.0f} bytes a clip" if store.clip_count else "",
        "values": f"{stamp.values} of {stamp.classes} classes, computed in {stamp.precision}",
        "form": f"the {stamp.top_k} largest of each clip, and one number for the rest" if stamp.top_k else "",
        "members": "each teacher's own logits, too: `pipeline reweight` can weigh them anew" if stamp.members else "",
        "made on": _tally(Counter(device for part in store.parts for device in part.devices)),
        "views": _views(stamp.views),
        "imported": _import(stamp.imported),
        "without logits": f"{sum(failures.values()):,} clips: {_tally(failures)}" if failures else "",
        "vocabulary sha256": stamp.vocabulary_sha256,
    }
    for number, teacher in enumerate(stamp.teachers, start=1):
        weights = f"weights sha256 {teacher.sha256}"
        rows[f"teacher {number}"] = f"{teacher.name}, weight {teacher.weight:g}\n{weights}\n{teacher.front_end}"
    _show(f"logit store {store.location}", rows)


def _views(views: ViewsStamp | None) -> str:
    if views is None:
        return ""
    config = views.config
    return (
        f"{views.count} of each clip, the first as it is; the others, of seed {config.seed}, shifted by up to "
        f"{config.max_shift_ms} ms and {config.max_gain_db:g} dB, their mel bands' lower edge by up to "
        f"{config.low_jitter_hz - 1} Hz, the upper one by {config.high_jitter_hz // 2} Hz"
    )


def _import(imported: ImportStamp | None) -> str:
    if imported is None:
        return ""
    files = [f"{file.name}, {_megabytes(file.size)}, sha256 {file.sha256}" for file in imported.files]
    told = [f"{imported.held} laid out as {imported.layout}", imported.origin, imported.conversion]
    more = [f"and {len(files) - _MAX_SHOWN:,} more files"] if len(files) > _MAX_SHOWN else []
    return "\n".join([*filter(None, told), *files[:_MAX_SHOWN], *more])


def _show_embeddings(path: str, stamp: EmbeddingStamp, parts: list[EmbeddingPart]) -> None:
    clips, size = sum(part.clips for part in parts), sum(part.file.size for part in parts)
    failures = failures_by_reason(parts)
    rows = {
        "clips": f"{clips:,} in {len(parts):,} parts, {_megabytes(size)}",
        "space": f"{size / clips:,.0f} bytes a clip" if clips else "",
        "values": f"{stamp.layers}, {stamp.size:,} numbers a clip in float16, computed in {stamp.precision}",
        "model": f"{stamp.model}\nweights sha256 {stamp.sha256}\n{stamp.front_end}",
        "without embedding": f"{sum(failures.values()):,} clips: {_tally(failures)}" if failures else "",
    }
    _show(f"embeddings {path}", rows)


def _show_coverage(data: str, holds: str, coverage: Coverage) -> None:
    covered, clips = coverage.covered_clips, coverage.clips
    shards = [f"{shard} ({count:,} clips)" for shard, count in coverage.uncovered_shards.items()]
    rows = {
        f"clips with {holds}": f"{covered:,} of {clips:,} ({100 * covered / max(clips, 1):.1f} %)",
        "not covered": _few(shards),
        "changed since": _few(coverage.changed_shards),
    }
    _show(f"coverage of {data}", rows)


def _show_run(path: str, summary: RunSummary) -> None:
    metrics = summary.last_metrics
    told = {key: value for key, value in summary.settings.items() if not isinstance(value, dict)}
    progress = "" if summary.rounds else "nothing logged yet"
    rows = {
        "progress": f"step {metrics['step']:,}, epoch {metrics['epoch']}" if metrics else progress,
        "rounds": ", ".join(f"{name} {summary.measure} {value:.4f}" for name, value in summary.rounds.items()),
        "best accuracy": _in_epoch(summary.best_accuracy, summary.best_accuracy_epoch),
        "best mAP": _in_epoch(summary.best_map, summary.best_epoch),
        "last metrics": ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if "/" in key),
        "settings": ", ".join(f"{key} {value}" for key, value in told.items()),
        "files": "\n".join(f"{name}, {_megabytes(size)}" for name, size in summary.files.items()),
    }
    _show(f"run {path}", rows)


def _in_epoch(value: float | None, epoch: int | None) -> str:
    return "" if value is None else f"{value:.4f} in epoch {epoch}"


def _show(title: str, rows: Mapping[str, str]) -> None:
    """Print a title and the rows that say something."""
    print_line(redact(title))  # a table's title would be broken to its width
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    print_table(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _tally(counts: Mapping[str, int]) -> str:
    return " · ".join(f"{what} {count:,}" for what, count in counts.items())


def _few(names: list[str] | tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return f"{len(names):,}: {', '.join(names[:_MAX_SHOWN])}{more}"
