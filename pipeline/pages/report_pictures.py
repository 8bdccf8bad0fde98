"""The drawings of a report that stay as they are, as SVG: how runs went, and how far probabilities come true."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.pages.documents import data_url
from pipeline.scoring.diagnostics import Calibration
from pipeline.scoring.pictures import RUN_STYLES, STYLE, TrainingCurves

COLOURS: Mapping[str, Sequence[str]] = {
    "light": ("#0072b2", "#b35900", "#00795a", "#a3487b", "#4b5563", "#7a5c00"),
    "dark": ("#56b4e9", "#e69f00", "#2bb894", "#e08fc0", "#c3c9d1", "#f0e442"),
}
"""Okabe and Ito's, darker on white and lighter on black, so that lines reach a contrast of 3 to 1 there; report.css has
the same."""
_INK = {
    "light": {"ink": "#30343b", "muted": "#6b7078", "grid": "#e8eaed"},
    "dark": {"ink": "#dfe3e8", "muted": "#9aa3ad", "grid": "#343a42"},
}
_MARKERS = "osD^vP"


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing for each colour scheme, as data: URLs."""

    light: str
    dark: str
    alt: str
    """What it shows, for whoever can't see it."""


def draw_losses(runs: Sequence[TrainingCurves], places: Sequence[int]) -> Picture:
    """Returns the training losses by step.

    Args:
        runs: one line each.
        places: which of `COLOURS` and of the dash patterns each has.
    """

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        for run, place in zip(runs, places, strict=True):
            axes.plot(run.loss_steps, run.losses, label=run.name, **_line(colours, place))
        axes.set(xlabel="step", ylabel="training loss, nats")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    ends = "; ".join(f"{run.name} ends at {run.losses[-1]:.4f} nats" for run in runs if run.losses)
    return _picture(draw, f"Training loss by step. {ends}")


def draw_scores(runs: Sequence[TrainingCurves], places: Sequence[int], teachers: float | None) -> Picture:
    """Returns the mAP on the evaluation clips by step; arguments as for `draw_losses`.

    Args:
        runs: one line each.
        places: which of `COLOURS` each has.
        teachers: the teachers' mAP, 0 to 1.
    """

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        for run, place in zip(runs, places, strict=True):
            marker = {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 4} if len(run.scores) <= 30 else {}
            axes.plot(run.score_steps, run.scores, label=run.name, **_line(colours, place), **marker)
        if teachers is not None:
            axes.axhline(teachers, label="teachers", **_line(colours, 0))
        axes.set(xlabel="step", ylabel="mAP on the run's evaluation clips")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    ends = "; ".join(f"{run.name} reaches {max(run.scores):.4f}" for run in runs if run.scores)
    return _picture(draw, f"mAP by step. {ends}")


def draw_calibration(systems: Sequence[tuple[str, Calibration]]) -> Picture:
    """Returns mean probability against what came true, one line a system, the diagonal where both are equal.

    Args:
        systems: their names and figures, in the order of `COLOURS`.
    """

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        axes.plot([0, 1], [0, 1], color=mpl.rcParams["axes.edgecolor"], linewidth=1, label="calibrated")
        for place, (name, found) in enumerate(systems):
            filled = found.counts > 0
            marker = {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 5}
            axes.plot(found.predicted[filled], found.observed[filled], label=name, **_line(colours, place), **marker)
        axes.set(xlabel="mean probability", ylabel="share that carries the class", xlim=(0, 1), ylim=(0, 1))

    told = "; ".join(f"{name}: calibration error {found.error:.4f}" for name, found in systems)
    return _picture(draw, f"Predicted probability against the share that came true. {told}")


def _line(colours: Sequence[str], place: int) -> dict:
    return {
        "color": colours[place % len(colours)],
        "linestyle": RUN_STYLES[place % len(RUN_STYLES)],
        "linewidth": 2,
        "clip_on": False,
    }


def _picture(draw, alt: str) -> Picture:
    return Picture(light=_svg(draw, "light"), dark=_svg(draw, "dark"), alt=alt)


def _svg(draw, scheme: str) -> str:
    ink = _INK[scheme]
    style = STYLE | {
        "axes.edgecolor": ink["muted"],
        "axes.labelcolor": ink["ink"],
        "xtick.color": ink["ink"],
        "ytick.color": ink["ink"],
        "text.color": ink["ink"],
        "grid.color": ink["grid"],
        "svg.fonttype": "none",  # the reader's own letters, and a fifth of the bytes
        "svg.hashsalt": "report",  # equal runs give equal bytes
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        draw(axes, COLOURS[scheme])
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", fontsize=9)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return data_url(stream.getvalue(), "image/svg+xml")
