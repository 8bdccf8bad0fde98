"""What distillation brings on a dataset, over several seeds: labels alone, distilled, and teachers alone.

Trains the same student in every condition with every seed, side by side, and writes a table, the figures and a picture.
Everything goes through the `pipeline` commands that a user would type. A study that was stopped goes on where it was.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import IO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import read_metrics
from pipeline.scoring.pictures import INK, RUN_COLOURS, STYLE, TEACHER_COLOUR

PARTS = {"train": "balanced_train_segments.csv", "eval": "eval_segments.csv"}
"""Folder of the study → the segment list it is made from."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to share the loss between labels and teachers."""

    name: str
    label_share: float
    """The labels' share of the loss, 0 to 1 (lambda of arXiv:2211.04772); 1 needs no teachers."""
    mixup_alpha: float
    """Parameter of mixup's Beta distribution; 0 is no mixup."""

    @property
    def folder(self) -> str:
        """The name of its runs' folders."""
        return f"lambda{self.label_share:g}-mixup{self.mixup_alpha:g}"

    def flags(self, store: Path) -> list[str]:
        """Returns the flags of `pipeline train-student`."""
        flags = ["--mixup.alpha", str(self.mixup_alpha)]
        if self.label_share < 1:
            flags += ["--store", str(store), "--distill.teacher-weight", str(1 - self.label_share)]
        return flags


CONDITIONS = tuple(
    Condition(f"{name}, {'mixup' if alpha else 'no mixup'}", label_share, alpha)
    for alpha, (name, label_share) in product(
        (0.3, 0.0), {"labels alone": 1.0, "distilled": 0.1, "teachers alone": 0.0}.items()
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A dataset in AudioSet's layout, the teachers, and where everything is kept."""

    data: Path
    out: Path
    recipe: Path
    teachers: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    """Runs side by side, each on an even share of the cores."""

    def prepare(self) -> None:
        """Make both datasets and both stores, as far as they are not there."""
        for part, segments in PARTS.items():
            if not (self.out / part / "manifest.parquet").exists():
                lists = ["--segments", str(self.data / segments), "--audio", str(self.data / "audio")]
                pipeline("ingest", "audioset", *lists, "--out", str(self.out / part), "--clips-per-shard", "128")
            where = ["--data", str(self.out / part), "--store", str(self.out / f"{part}-logits")]
            pipeline("teacher-logits", *where, "--teacher", *self.teachers)

    def run(self, condition: Condition, seed: int) -> None:
        """Train one student, or go on with it."""
        folder = self.folder(condition, seed)
        flags = ["--config", str(self.recipe), "--seed", str(seed), "--run", str(folder)]
        flags += ["--data", str(self.out / "train"), "--eval-data", str(self.out / "eval")]
        flags += ["--cache", str(self.out / "cache"), *condition.flags(self.out / "train-logits")]
        threads = max(1, usable_cores() // self.jobs)
        resume = ["--resume"] if folder.exists() else []
        with (self.out / f"{folder.name}.log").open("a") as log:
            pipeline("train-student", *flags, *resume, threads=threads, log=log)
        print(f"{folder.name}: mAP {self.scores(condition, seed)[-1]:.4f}", flush=True)

    def folder(self, condition: Condition, seed: int) -> Path:
        """Returns the run folder of one student."""
        return self.out / f"{condition.folder}-seed{seed}"

    def scores(self, condition: Condition, seed: int) -> list[float]:
        """Returns mAP, 0 to 1, at each evaluation of one student; the last one is what the study reports."""
        return [line["eval/mAP"] for line in read_metrics(self.folder(condition, seed)) if "eval/mAP" in line]

    def score_epochs(self) -> list[float]:
        """Returns the epochs of those evaluations."""
        lines = read_metrics(self.folder(CONDITIONS[0], self.seeds[0]))
        return [line["epoch"] + 1 for line in lines if "eval/mAP" in line]

    def teachers_map(self) -> float:
        """Returns the mAP of the stored logits on the evaluation clips, 0 to 1."""
        report = self.out / "teachers"
        where = ["--data", str(self.out / "eval"), "--store", str(self.out / "eval-logits"), "--out", str(report)]
        pipeline("evaluate", *where)
        return json.loads((report / "report.json").read_text())["systems"][0]["mAP"]


def pipeline(*arguments: str, threads: int | None = None, log: IO[str] | None = None) -> None:
    """Run one command; its output goes to `log`, or is shown.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"pipeline {' '.join(arguments)} ended with {done.returncode}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One condition over all seeds."""

    condition: Condition
    curves: list[list[float]]
    """(seeds, evaluations), mAP 0 to 1."""

    @property
    def finals(self) -> list[float]:
        """(seeds,), mAP after the last epoch."""
        return [curve[-1] for curve in self.curves]


def gain(result: Result, baseline: Result) -> tuple[float, float]:
    """Returns the mean and the standard deviation of mAP above the baseline's, seed by seed."""
    gains = [mine - its for mine, its in zip(result.finals, baseline.finals, strict=True)]
    return mean(gains), spread(gains)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds, with n - 1; nan for one seed."""
    return stdev(values) if len(values) > 1 else math.nan


def table(results: Sequence[Result], teachers_map: float) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    seeds = len(results[0].finals)
    yield f"| student | mAP, mean of {seeds} seeds | standard deviation | above labels alone, same mixup and seed |"
    yield "|---|---:|---:|---:|"
    yield f"| (the teachers) | {teachers_map:.4f} | | |"
    baselines = {result.condition.mixup_alpha: result for result in results if result.condition.label_share == 1}
    for result in results:
        baseline = baselines[result.condition.mixup_alpha]
        above, deviation = gain(result, baseline)
        said = "" if result is baseline else f"{above:+.4f} ± {deviation:.4f}"
        yield f"| {result.condition.name} | {mean(result.finals):.4f} | {spread(result.finals):.4f} | {said} |"


def draw(path: Path, results: Sequence[Result], epochs: Sequence[float], teachers_map: float) -> None:
    """Draw mAP by epoch, the mean and the range of the seeds, and every seed's last mAP."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
        shares = sorted({result.condition.label_share for result in results}, reverse=True)
        for place, result in enumerate(results):
            colour = RUN_COLOURS[shares.index(result.condition.label_share)]
            _draw_curve(curves, result, epochs, colour)
            finals.scatter([place] * len(result.finals), result.finals, color=colour, s=36, alpha=0.6, linewidths=0)
            finals.hlines(mean(result.finals), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        for axes in (curves, finals):
            axes.axhline(teachers_map, color=TEACHER_COLOUR, linewidth=2, zorder=0)
        curves.annotate("teachers", (epochs[0], teachers_map), color=INK, va="bottom")
        curves.set(xlabel="epoch", ylabel="mAP", title="Mean and range over the seeds")
        curves.legend(loc="lower right")
        finals.set(title="After the last epoch, every seed")
        finals.set_xticks(range(len(results)), [result.condition.name.replace(", ", ",\n") for result in results])
        finals.tick_params(axis="x", labelsize=8, labelrotation=45)
        figure.savefig(path, dpi=120)


def _draw_curve(axes: Axes, result: Result, epochs: Sequence[float], colour: str) -> None:
    by_epoch = list(zip(*result.curves, strict=True))  # (evaluations, seeds)
    style = "-" if result.condition.mixup_alpha else "--"
    axes.plot(epochs, [mean(scores) for scores in by_epoch], style, color=colour, label=result.condition.name)
    axes.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=colour, alpha=0.12, linewidth=0)


def conclude(study: Study) -> None:
    """Write what came out: report/study.md, study.json and study.png."""
    results = [
        Result(condition=condition, curves=[study.scores(condition, seed) for seed in study.seeds])
        for condition in CONDITIONS
    ]
    teachers_map, epochs = study.teachers_map(), study.score_epochs()
    report = study.out / "report"
    report.mkdir(exist_ok=True)
    lines = list(table(results, teachers_map))
    (report / "study.md").write_text("\n".join(lines) + "\n")
    figures = {result.condition.name: dict(zip(study.seeds, result.curves, strict=True)) for result in results}
    content = {"teachers_mAP": teachers_map, "epochs": epochs, "mAP_by_condition_and_seed": figures}
    (report / "study.json").write_text(json.dumps(content, indent=2) + "\n")
    draw(report / "study.png", results, epochs, teachers_map)
    print("\n".join(lines))


def main() -> None:
    """Prepare, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with AudioSet's CSV files and audio/")
    parser.add_argument("--out", type=Path, required=True, help="folder for datasets, stores, runs and the report")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe of the student")
    parser.add_argument("--teacher", nargs="+", required=True, help="as for pipeline teacher-logits")
    parser.add_argument("--seeds", type=int, default=3, help="students a condition, 1 or more")
    parser.add_argument("--jobs", type=int, default=2, help="students trained side by side, 1 or more")
    options = parser.parse_args()
    study = Study(
        data=options.data,
        out=options.out,
        recipe=options.recipe,
        teachers=tuple(options.teacher),
        seeds=tuple(range(options.seeds)),
        jobs=options.jobs,
    )
    study.out.mkdir(parents=True, exist_ok=True)
    study.prepare()
    with ThreadPoolExecutor(study.jobs) as pool:
        for run in [pool.submit(study.run, condition, seed) for seed in study.seeds for condition in CONDITIONS]:
            run.result()
    conclude(study)


if __name__ == "__main__":
    main()
