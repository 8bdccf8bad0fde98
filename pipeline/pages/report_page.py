"""Scored runs → the report: one HTML file with curves, classes, calibration, the clips most wrong, settings, hashes."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from pipeline.models.hearing import AudioModel, model_input
from pipeline.pages.documents import render
from pipeline.pages.report_pictures import draw_calibration, draw_losses, draw_scores
from pipeline.pages.scored_runs import ScoredRuns
from pipeline.pages.wrong_clips import most_wrong_clips
from pipeline.redaction import redact
from pipeline.runtime.recipes import flat_settings
from pipeline.scoring.diagnostics import calibrate, precision_recall_curves
from pipeline.scoring.pictures import read_curves
from pipeline.scoring.report import SystemScores
from pipeline.scoring.scoring import scored_rows
from pipeline.storage import files as storage
from pipeline.training.folder import CONFIG_NAME

_CURVE_POINTS = 40
_MAX_SECONDS = 30.0
"""Of a sound that is embedded, where its model hears clips to their end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportLimits:
    """How much of the sounds goes into the file."""

    clips: int = 12
    """How many of the clips that are most wrong are shown, 0 or more."""
    sound_megabytes: float = 4.0
    """Of their sounds together, as MP3; a third more in the file. The clips beyond are shown without."""


def report_page(scored: ScoredRuns, limits: ReportLimits) -> bytes:
    """Returns the report of some runs as HTML, whole in itself.

    Args:
        scored: the runs.
        limits: how much of the sounds goes into it.

    Raises:
        StorageUnavailableError: the dataset's shards can't be reached.
    """
    rows = scored_rows(scored.systems, scored.manifest)
    report, first_run = scored.report, len(scored.systems) - len(scored.runs)
    calibrations = [calibrate(system, scored.manifest, rows) for system in scored.systems]
    names = [system.name for system in report.systems]
    places = range(first_run, len(names))
    curves = [read_curves(run, names[place]) for run, place in zip(scored.runs, places, strict=True)]
    teachers = scored.teachers
    against = first_run + 1 if len(scored.runs) > 1 else 0 if first_run else None
    settings = [_settings_of(run) for run in scored.runs]
    heard = model_input(_audio_model(scored)).seconds
    return render(
        "report.html",
        style="report.css",
        script="report.js",
        data={"systems": names, "classes": _classes(scored, rows), "clips": report.clips},
        names=names,
        report=report,
        run_names=names[first_run:],
        first_run=first_run,
        against=against,
        calibrations=calibrations,
        losses=draw_losses(curves, places),
        scores=draw_scores(curves, places, teachers.mean_average_precision if teachers else None),
        calibration=draw_calibration(list(zip(names, calibrations, strict=True))),
        wrong=most_wrong_clips(
            scored.systems[first_run],
            scored.manifest,
            rows,
            clips=limits.clips,
            max_seconds=min(heard, _MAX_SECONDS),
            max_bytes=limits.sound_megabytes * 1e6,
        ),
        settings=settings,
        differing=_differing(settings),
        hashes=_hashes(scored),
    )


def _audio_model(scored: ScoredRuns) -> AudioModel:
    return scored.models[0].network  # pyright: ignore[reportReturnType]


def _classes(scored: ScoredRuns, rows: np.ndarray) -> list[dict[str, Any]]:
    """Returns for each class with a positive clip what the table and its curves show; ratios in thousandths."""
    report = scored.report
    curves = zip(
        *(
            precision_recall_curves(system, scored.manifest, rows, max_points=_CURVE_POINTS)
            for system in scored.systems
        ),
        strict=True,
    )
    return [
        {
            "name": report.class_names[index],
            "id": report.class_mids[index],
            "clips": int(report.positives[index]),
            "ap": [_rounded(system.average_precision[index]) for system in report.systems],
            "auc": [_rounded(system.roc_auc[index]) for system in report.systems],
            "curves": [np.rint(one * 1000).astype(int).ravel().tolist() for one in of_class],
        }
        for index, of_class in enumerate(curves)
        if report.positives[index]
    ]


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _settings_of(run: str) -> str:
    location = storage.join_path(run, CONFIG_NAME)
    return redact(storage.read_bytes(location).decode(errors="replace")) if storage.exists(location) else ""


def _differing(settings: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns the settings that the runs do not share: (key, each run's value, empty where it has none)."""
    flat = [flat_settings(tomllib.loads(text)) for text in settings]
    keys = sorted({key for one in flat for key in one} - {"run"})
    values = [(key, ["" if key not in one else str(one[key]) for one in flat]) for key in keys]
    return [(key, of_runs) for key, of_runs in values if len(set(of_runs)) > 1]


def _hashes(scored: ScoredRuns) -> list[tuple[str, str]]:
    """Returns what was compared, as (what, hash or version)."""
    report = scored.report
    systems: Sequence[SystemScores] = scored.students
    teachers = [] if scored.stamp is None else scored.stamp.teachers
    return [
        ("ids of the clips that were scored", report.clip_ids_sha256),
        ("classes", scored.manifest.vocabulary.sha256),
        ("dataset: clips, labels, classes", scored.manifest.identity),
        *((f"weights of {system.name}, {system.source}", system.sha256) for system in systems),
        *(
            (f"weights of the teacher {teacher.name}, weight {teacher.weight:g}", teacher.sha256)
            for teacher in teachers
        ),
        ("audioset-distill", version("audioset-distill")),
        ("torch", str(torch.__version__)),
    ]
