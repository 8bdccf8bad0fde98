"""The study's tables, figures and pictures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.scoring.pictures import INK, RUN_COLOURS, STYLE, TEACHER_COLOUR

ALONE_COLOUR, STORE_COLOUR = RUN_COLOURS[1], RUN_COLOURS[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One condition over all seeds."""

    name: str
    label_share: float
    """Share of the clips that kept their labels, 0 to 1."""
    with_store: bool
    curves: Mapping[int, Sequence[tuple[float, float]]]
    """Seed → (step, mAP from 0 to 1) of each evaluation."""

    @property
    def finals(self) -> list[float]:
        """(seeds,), mAP after the last epoch."""
        return [curve[-1][1] for curve in self.curves.values()]

    @property
    def said(self) -> str:
        """Mean and standard deviation over the seeds."""
        return plus_minus(self.finals)


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    """Returns `0.4321 ± 0.0123`: mean and standard deviation, with n - 1; without the latter for one value."""
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.4f}{spread}"


def gains(result: Result, baseline: Result) -> list[float]:
    """Returns mAP above the baseline's, for each seed that both have."""
    both = [seed for seed in result.curves if seed in baseline.curves]
    return [result.curves[seed][-1][1] - baseline.curves[seed][-1][1] for seed in both]


def gain(result: Result, baseline: Result | None) -> str:
    """Returns the mean gain, its spread, and with how many of the seeds there was one; empty without a seed of both."""
    values = gains(result, baseline) if baseline else []
    if not values:
        return ""
    return f"{plus_minus(values, '+')} ({sum(value > 0 for value in values)} of {len(values)})"


def write_report(
    folder: Path,
    parts: Mapping[str, Sequence[Result]],
    teachers_map: float,
    student_macs: int,
    teacher_macs: float | None,
) -> None:
    """Write study.md, study.json and the pictures, and show the tables.

    Args:
        folder: receives them.
        parts: part of the study → its conditions.
        teachers_map: mAP of the stored logits on the evaluation clips, 0 to 1.
        student_macs: multiplications of the student for a clip.
        teacher_macs: those of its teachers; None where nobody knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"The teachers' mAP: {teachers_map:.4f}. {_cost(student_macs, teacher_macs)}"]
    for part, results in parts.items():
        lines += ["", f"### {part}", ""]
        lines += label_table(results, teachers_map) if part == "labels" else part_table(results, teachers_map)
    (folder / "study.md").write_text("\n".join(lines) + "\n")
    figures = {part: {result.name: result.curves for result in results} for part, results in parts.items()}
    content = {
        "teachers_mAP": teachers_map,
        "student_macs": student_macs,
        "teacher_macs": teacher_macs,
        "step_and_mAP_by_part_condition_and_seed": figures,
    }
    (folder / "study.json").write_text(json.dumps(content, indent=2) + "\n")
    if "labels" in parts:
        draw_labels(folder / "study.png", parts["labels"], teachers_map)
    if others := {part: results for part, results in parts.items() if part != "labels"}:
        draw_parts(folder / "settings.png", others, teachers_map)
    print("\n".join(lines))


def _cost(student_macs: int, teacher_macs: float | None) -> str:
    text = f"The student takes {student_macs / 1e6:.0f} M multiplications a clip"
    if not teacher_macs:
        return f"{text}."
    return f"{text}, {100 * student_macs / teacher_macs:.2g} % of the teachers' {teacher_macs / 1e9:.3g} G."


def label_table(results: Sequence[Result], teachers_map: float) -> Iterator[str]:
    """Yields a Markdown table: for each share of the labels, what is learned without the store and with it."""
    by_share = {(result.label_share, result.with_store): result for result in results}
    baseline = by_share.get((1.0, False))
    yield (
        "| labels | seeds | labels alone, mAP | with the store | gain, seed by seed "
        "| share of the teachers' mAP | against all labels alone |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for share in sorted({result.label_share for result in results}, reverse=True):
        alone, taught = by_share.get((share, False)), by_share[share, True]
        yield (
            f"| {100 * share:g} % | {len(taught.finals)} | {alone.said if alone else ''} | {taught.said} "
            f"| {gain(taught, alone)} | {100 * mean(taught.finals) / teachers_map:.0f} % "
            f"| {gain(taught, baseline)} |"
        )


def part_table(results: Sequence[Result], teachers_map: float) -> Iterator[str]:
    """Yields a Markdown table: each setting's mAP, and what it is above the first one's."""
    baseline = results[0]
    yield f"| | mAP over {len(baseline.finals)} seeds | share of the teachers' | above {baseline.name} |"
    yield "|---|---:|---:|---:|"
    for result in results:
        above = "" if result is baseline else gain(result, baseline)
        yield f"| {result.name} | {result.said} | {100 * mean(result.finals) / teachers_map:.0f} % | {above} |"


def draw_labels(path: Path, results: Sequence[Result], teachers_map: float) -> None:
    """Draw mAP over the share of labels, with the store and without, and how it grew with all labels and with none."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        shares, curves = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, with_store, colour in (("with the store", True, STORE_COLOUR), ("labels alone", False, ALONE_COLOUR)):
            mine = sorted((one for one in results if one.with_store == with_store), key=lambda one: one.label_share)
            places = [_place(one.label_share) for one in mine]
            shares.plot(places, [mean(one.finals) for one in mine], color=colour, linewidth=2.5, label=name)
            for place, one in zip(places, mine, strict=True):
                shares.scatter([place] * len(one.finals), one.finals, color=colour, s=30, alpha=0.55, linewidths=0)
        ticks = sorted({result.label_share for result in results})
        shares.set_xticks(list(map(_place, ticks)), [f"{100 * share:g} %" for share in ticks])
        shares.set(xlabel="training clips with labels; all have logits", ylabel="mAP", title="Every seed, and the mean")
        _draw_teachers(shares, teachers_map)
        shares.legend(loc="best")
        for name, share, with_store, style, colour in (
            ("all labels, with the store", 1.0, True, "-", STORE_COLOUR),
            ("all labels, alone", 1.0, False, "-", ALONE_COLOUR),
            ("no label, with the store", 0.0, True, "--", STORE_COLOUR),
        ):
            for one in results:
                if (one.label_share, one.with_store) == (share, with_store):
                    _draw_curve(curves, one, name, style, colour)
        _draw_teachers(curves, teachers_map)
        curves.set(xlabel="step", title="Mean and range over the seeds")
        curves.legend(loc="best")
        figure.savefig(path, dpi=120)


def _place(share: float) -> float:
    """Returns where a share of labels stands: small ones apart, none at all beside them."""
    return math.log10(share) if share else -1.5


def _draw_curve(axes: Axes, result: Result, name: str, style: str, colour: str) -> None:
    """Draw the mean and range of the seeds that have an evaluation at a step; of some only the last is known."""
    by_step: dict[float, list[float]] = {}
    for step, score in sorted(point for curve in result.curves.values() for point in curve):
        by_step.setdefault(step, []).append(score)
    axes.plot(list(by_step), list(map(mean, by_step.values())), style, color=colour, label=name)
    low, high = (list(map(limit, by_step.values())) for limit in (min, max))
    axes.fill_between(list(by_step), low, high, color=colour, alpha=0.12, linewidth=0)


def _draw_teachers(axes: Axes, teachers_map: float) -> None:
    axes.axhline(teachers_map, color=TEACHER_COLOUR, linewidth=2, zorder=0)
    axes.annotate("teachers", (0.01, teachers_map), xycoords=("axes fraction", "data"), color=INK, va="bottom")


def draw_parts(path: Path, parts: Mapping[str, Sequence[Result]], teachers_map: float) -> None:
    """Draw every seed's last mAP in each setting, a panel a part."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 3.2 * len(parts), 4.4), layout="constrained")
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (part, results) in zip(panels, parts.items(), strict=True):
            for place, result in enumerate(results):
                colour = STORE_COLOUR if result.with_store else ALONE_COLOUR
                axes.scatter([place] * len(result.finals), result.finals, color=colour, s=36, alpha=0.6, linewidths=0)
                axes.hlines(mean(result.finals), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
            axes.axhline(teachers_map, color=TEACHER_COLOUR, linewidth=2, zorder=0)
            axes.set(title=part)
            axes.set_xticks(range(len(results)), [result.name.replace(", ", ",\n") for result in results])
            axes.tick_params(axis="x", labelsize=8, labelrotation=45 if len(results) > 4 else 0)
        panels[0].set_ylabel("mAP")
        figure.savefig(path, dpi=120)
