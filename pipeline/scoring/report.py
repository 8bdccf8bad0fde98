"""What an evaluation found, as a table for the terminal and as files for scripts."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.scoring.intervals import CONFIDENCE, Difference, Interval
from pipeline.storage import files as storage


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemScores:
    """How well one system (a checkpoint, an ensemble, a logit store) tags the clips of a dataset."""

    name: str
    """What tables and columns call it; no two systems of a report share one."""
    source: str
    """The file, folder or members that it stands for."""
    sha256: str
    """Hash of the checkpoint's bytes; empty for an ensemble or a store."""
    mean_average_precision: float
    """Mean over the classes that have positives, 0 to 1."""
    mean_roc_auc: float
    """Mean over the classes that have positives and negatives, 0 to 1."""
    d_prime: float
    """The distance of two unit normals, in standard deviations, that gives `mean_roc_auc`."""
    average_precision: np.ndarray
    """(classes,), float64; NaN where a class has no positives."""
    roc_auc: np.ndarray
    """(classes,), float64; NaN where a class has no positives or no negatives."""
    class_d_prime: np.ndarray
    """(classes,), float64; NaN where `roc_auc` is."""
    accuracy: float | None = None
    """Share of the clips whose one class has the highest score, 0 to 1; None where clips may have several classes."""
    replicates: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(replicates,), float64: the mAP on clips drawn anew, of the same draws for all systems of a report."""

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mAP; None where nothing was resampled."""
        return Interval.of(self.replicates)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """The scores of one or more systems on the very same clips."""

    data: str
    """The dataset's location."""
    clips: int
    """How many clips were scored."""
    clip_ids_sha256: str
    """Hash of the scored clips' ids, whatever their order; equal hashes mean comparable scores."""
    class_mids: tuple[str, ...]
    class_names: tuple[str, ...]
    positives: np.ndarray
    """(classes,), int64: scored clips that carry the class."""
    failures: tuple[tuple[str, str], ...]
    """(clip id, reason) of each clip of the dataset that was not scored."""
    systems: tuple[SystemScores, ...]

    @property
    def classes_scored(self) -> int:
        """How many classes have positives; the others are in no mean."""
        return int((self.positives > 0).sum())

    @property
    def failures_by_reason(self) -> dict[str, int]:
        """How many clips were not scored, by reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.failures).most_common())

    def system(self, name: str) -> SystemScores:
        """Returns one system's scores.

        Raises:
            KeyError: no system has that name.
        """
        return {system.name: system for system in self.systems}[name]

    @property
    def replicates(self) -> int:
        """How often the clips were drawn anew; 0 where they were not."""
        return max((len(system.replicates) for system in self.systems), default=0)


def differences(systems: Sequence[SystemScores]) -> list[Difference]:
    """Returns what the first of some systems of a report is above each of the others; nothing without replicates."""
    found = []
    for baseline in systems[1:]:
        first, interval = systems[0], Interval.of(systems[0].replicates - baseline.replicates)
        if interval is not None:
            gain = first.mean_average_precision - baseline.mean_average_precision
            found.append(
                Difference(system=first.name, baseline=baseline.name, mean_average_precision=gain, interval=interval)
            )
    return found


def hash_of_ids(clip_ids: pa.Array) -> str:
    """Returns the SHA-256 of a set of clip ids, whatever their order: the ids sorted by their bytes, one a line.

    `LC_ALL=C sort ids.txt | sha256sum` gives the same.
    """
    lines = "".join(f"{clip_id}\n" for clip_id in clip_ids.sort().to_pylist())
    return hashlib.sha256(lines.encode()).hexdigest()


def score_table(report: EvaluationReport) -> Group:
    """Lay the systems out side by side, and say below what they were scored on."""
    scored, classes = report.classes_scored, len(report.positives)
    lines = [
        f"{report.clips:,} clips of {report.data}, ids sha256 {report.clip_ids_sha256[:12]}",
        f"{scored} of {classes} classes; the {classes - scored} without positives left out",
    ]
    lines += [f"{count:,} clips not scored: {reason}" for reason, count in report.failures_by_reason.items()]
    table = Table("system")
    accurate = any(system.accuracy is not None for system in report.systems)
    intervals = [system.interval for system in report.systems]
    resampled = [f"{100 * CONFIDENCE:.0f} % interval"] if any(intervals) else []
    if resampled:
        lines.append(f"intervals from {report.replicates:,} draws of the {report.clips:,} clips, with replacement")
    for heading in ("mAP", *resampled, "ROC AUC", "d′", *(["accuracy"] if accurate else [])):
        table.add_column(heading, justify="right")
    for system, interval in zip(report.systems, intervals, strict=True):
        shown = "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
        table.add_row(
            Text(system.name),
            f"{system.mean_average_precision:.4f}",
            *([shown] if resampled else []),
            f"{system.mean_roc_auc:.4f}",
            f"{system.d_prime:.3f}",
            *(["" if system.accuracy is None else f"{system.accuracy:.4f}"] if accurate else []),
        )
    return Group(table, Text("\n".join(lines), style="dim"))


def report_json(report: EvaluationReport) -> bytes:
    """Returns a report as JSON; the per-class scores are in `per_class_csv`."""
    content: dict[str, Any] = {
        "data": report.data,
        "clips": report.clips,
        "clip_ids_sha256": report.clip_ids_sha256,
        "classes": len(report.positives),
        "classes_scored": report.classes_scored,
        "classes_without_positives": len(report.positives) - report.classes_scored,
        "systems": [
            {
                "name": system.name,
                "source": system.source,
                "sha256": system.sha256 or None,
                "mAP": _number(system.mean_average_precision),
                "mAP_interval": _ends(system.interval),
                "roc_auc": _number(system.mean_roc_auc),
                "d_prime": _number(system.d_prime),
                **({} if system.accuracy is None else {"accuracy": _number(system.accuracy)}),
            }
            for system in report.systems
        ],
        "bootstrap": {"replicates": report.replicates, "confidence": CONFIDENCE},
        "differences": [
            {
                "system": difference.system,
                "baseline": difference.baseline,
                "mAP": difference.mean_average_precision,
                "mAP_interval": _ends(difference.interval),
                "beyond_chance": difference.beyond_chance,
            }
            for first in range(len(report.systems))
            for difference in differences(report.systems[first:])
        ],
        "clips_not_scored": report.failures_by_reason,
        "not_scored": [{"clip_id": clip_id, "reason": reason} for clip_id, reason in report.failures],
    }
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def per_class_csv(report: EvaluationReport) -> bytes:
    """Returns the per-class scores as CSV: one row a class, three columns a system, empty where there is no score."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    columns = [f"{score}:{system.name}" for system in report.systems for score in ("ap", "roc_auc", "d_prime")]
    writer.writerow(["index", "mid", "name", "positives", *columns])
    for index, (mid, name) in enumerate(zip(report.class_mids, report.class_names, strict=True)):
        scores = [
            _number(float(per_class[index]), digits=6)
            for system in report.systems
            for per_class in (system.average_precision, system.roc_auc, system.class_d_prime)
        ]
        writer.writerow([index, mid, name, int(report.positives[index]), *scores])
    return rows.getvalue().encode()


def write_report(folder: str | Path, report: EvaluationReport) -> list[str]:
    """Publish report.json and per_class.csv in a folder; give their locations."""
    files = {"report.json": report_json(report), "per_class.csv": per_class_csv(report)}
    locations = [storage.join_path(folder, name) for name in files]
    for location, content in zip(locations, files.values(), strict=True):
        storage.publish_bytes(location, content)
    return locations


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _number(value: float, digits: int | None = None) -> float | None:
    if not np.isfinite(value):
        return None
    return value if digits is None else round(value, digits)
