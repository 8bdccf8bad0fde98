"""One picture of what distillation brings: the training's curves, and each class's score beside the teachers'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.runtime.progress import read_metrics
from pipeline.scoring.report import SystemScores
from pipeline.storage import files as storage

# Okabe and Ito's colours stay apart for every kind of colour blindness; line styles tell them apart in grey.
RUN_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
RUN_STYLES = ("-", "--", "-.", ":")
TEACHER_COLOUR = "#c9ccd1"
INK = "#30343b"
STYLE: Any = {
    "font.size": 10.5,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCurves:
    """How one run went."""

    name: str
    """What the legend calls it; a system of the same name gets the same colour."""
    loss_steps: Sequence[float]
    """After how many optimizer steps each loss was measured: what runs on more or fewer clips share."""
    losses: Sequence[float]
    """In nats."""
    score_steps: Sequence[float]
    """After how many optimizer steps each score was measured."""
    scores: Sequence[float]
    """mAP on the evaluation clips, 0 to 1."""


def read_curves(run: str, name: str) -> TrainingCurves:
    """Returns the curves of a training run's losses and mAP, read from its metrics.

    Args:
        run: its folder, a path or a URL.
        name: see `TrainingCurves`.
    """
    lines = read_metrics(run)
    losses = [line for line in lines if "epoch/loss" in line]
    scores = [line for line in lines if "eval/mAP" in line]
    return TrainingCurves(
        name=name,
        loss_steps=[line["step"] for line in losses],
        losses=[line["epoch/loss"] for line in losses],
        score_steps=[line["step"] for line in scores],
        scores=[line["eval/mAP"] for line in scores],
    )


def training_picture(
    location: str | Path,
    *,
    runs: Sequence[TrainingCurves],
    students: Sequence[SystemScores],
    teachers: SystemScores | None,
    class_names: Sequence[str],
    positives: np.ndarray,
    max_classes: int = 32,
) -> None:
    """Draw losses, mAP by step and average precision by class, and publish them as one PNG.

    Args:
        location: where the picture goes, a path or a URL.
        runs: one curve a run in the upper panels.
        students: one narrow bar a student in each class of the lower panel.
        teachers: the wide bars behind them, and the line to reach in the upper right panel.
        class_names: (classes,), as in the vocabulary.
        positives: (classes,), clips that carry each class. Classes without any are not drawn.
        max_classes: of the others, the ones with the most positives are drawn, up to this many.
    """
    names = [run.name for run in runs] + [student.name for student in students]
    colours = dict(zip(dict.fromkeys(names), RUN_COLOURS * len(names), strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.6), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.25))
        _draw_losses(figure.add_subplot(grid[0, 0]), runs, colours)
        _draw_scores(figure.add_subplot(grid[0, 1]), runs, teachers, colours)
        systems = students if teachers is None else [teachers, *students]
        chosen = _classes_to_draw(systems, positives, max_classes)
        lower = figure.add_subplot(grid[1, :])
        _draw_classes(lower, chosen, class_names, students, teachers, colours)
        scored = int((positives > 0).sum())
        which = f"the {len(chosen)} of {scored} classes with the most clips" if len(chosen) < scored else "every class"
        lower.set_title(f"Average precision of {which}")
        _lift_legend(figure, lower)
        with storage.publish(location) as staged:
            figure.savefig(staged, format="png", metadata={"Software": None})


def _draw_losses(axes: Axes, runs: Sequence[TrainingCurves], colours: Mapping[str, str]) -> None:
    for run, style in zip(runs, RUN_STYLES * len(runs), strict=False):
        steps, losses = np.asarray(run.loss_steps), np.asarray(run.losses)
        smooth_steps, smooth_losses = _smooth(steps), _smooth(losses)
        if len(smooth_losses) < len(losses):
            axes.plot(steps, losses, color=colours[run.name], alpha=0.25, linewidth=0.8)
        axes.plot(smooth_steps, smooth_losses, style, color=colours[run.name], linewidth=2, label=run.name)
    axes.set(title="Training loss", ylabel="nats, each run's own objective")
    axes.set_ylim(bottom=0)
    _finish_steps(axes, runs, "lower left")  # the curves come down from above and never get there


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a fortieth of the values, so that a curve of thousands of steps can be read."""
    width = max(1, len(values) // 40)
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if len(values) else values


def _draw_scores(
    axes: Axes, runs: Sequence[TrainingCurves], teachers: SystemScores | None, colours: Mapping[str, str]
) -> None:
    for run, style in zip(runs, RUN_STYLES * len(runs), strict=False):
        few = len(run.scores) <= 30
        axes.plot(
            run.score_steps,
            run.scores,
            style,
            color=colours[run.name],
            marker="o" if few else None,
            markersize=4,
            linewidth=2,
            label=run.name,
        )
    if teachers is not None:
        axes.axhline(teachers.mean_average_precision, color="#6b7078", linewidth=1.5, linestyle=(0, (6, 2)))
        axes.annotate(
            f"{teachers.name} {teachers.mean_average_precision:.3f}",
            (0, teachers.mean_average_precision),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            color="#6b7078",
        )
    best = [teachers.mean_average_precision] if teachers else []
    best += [score for run in runs for score in run.scores]
    axes.set(title="mAP on the evaluation clips", ylim=(0, 1.16 * max(best, default=1)))
    _finish_steps(axes, runs, "lower right")


def _finish_steps(axes: Axes, runs: Sequence[TrainingCurves], legend: Literal["lower left", "lower right"]) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if runs:
        axes.legend(loc=legend)


def _classes_to_draw(systems: Sequence[SystemScores], positives: np.ndarray, max_classes: int) -> np.ndarray:
    """Returns the indices of the classes with the most positives, the best of the first system first."""
    frequent = np.argsort(-positives, kind="stable")[:max_classes]
    frequent = frequent[positives[frequent] > 0]
    return frequent[np.argsort(-systems[0].average_precision[frequent], kind="stable")] if systems else frequent


def _draw_classes(
    axes: Axes,
    chosen: np.ndarray,
    class_names: Sequence[str],
    students: Sequence[SystemScores],
    teachers: SystemScores | None,
    colours: Mapping[str, str],
) -> None:
    places = np.arange(len(chosen))
    if teachers is not None:
        label = _label(teachers)
        axes.bar(places, teachers.average_precision[chosen], 0.86, color=TEACHER_COLOUR, label=label)
    width = 0.6 / max(1, len(students))
    for order, student in enumerate(students):
        offset = (order - (len(students) - 1) / 2) * width
        label = _label(student)
        axes.bar(places + offset, student.average_precision[chosen], width, color=colours[student.name], label=label)
    axes.set_xticks(
        places, [_shorten(str(class_names[index])) for index in chosen], rotation=50, ha="right", fontsize=9
    )
    for tick in axes.get_xticklabels():
        tick.set_rotation_mode("anchor")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set(xlim=(-0.6, max(len(chosen), 1) - 0.4), ylim=(0, 1.02), yticks=np.linspace(0, 1, 6))
    if teachers is not None or students:
        axes.legend(loc="upper right")


def _lift_legend(figure: Figure, axes: Axes) -> None:
    """Raise the upper limit of finished axes, so that their legend stands above all bars."""
    if (legend := axes.get_legend()) is None:
        return
    figure.draw_without_rendering()
    taken = (axes.bbox.y1 - legend.get_window_extent().y0) / axes.bbox.height
    axes.set_ylim(0, 1.02 / (1 - min(taken, 0.6)))  # with a legend of dozens the bars keep some room all the same


def _label(system: SystemScores) -> str:
    ends = "" if system.interval is None else f" ({system.interval.low:.3f} to {system.interval.high:.3f})"
    return f"{system.name}, mAP {system.mean_average_precision:.3f}{ends}"


def _shorten(name: str, max_characters: int = 21) -> str:
    return name if len(name) <= max_characters else f"{name[: max_characters - 1].rstrip(' ,')}…"
