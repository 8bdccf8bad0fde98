"""What distillation brings on a dataset, over several seeds: with how many labels, and in which settings.

Trains the same student in every condition with every seed, side by side, and writes tables, the figures and pictures.
Everything goes through the `pipeline` commands that a user would type. A study that was stopped goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

import student
import teacher
from benchmarks.study_record import Curve, StudyRecord, key_of
from benchmarks.study_report import Result, write_report
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import PipelineError
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import read_metrics

DATASETS = {"train": "balanced_train_segments.csv", "eval": "eval_segments.csv"}
"""Folder of the study → the segment list it is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a student learns from."""

    label_share: float = 1.0
    """Share of the clips that keep their labels, 0 to 1."""
    form: str | None = "whole"
    """Form of the logits: whole, top20 or views4; None learns from the labels alone."""
    teacher_weight: float = 0.5
    """Share of a labelled clip's loss that comes from its logits; half suits some hundred clips (docs/results.md)."""
    temperature: float = 1.0
    mixup: bool = True

    @property
    def folder(self) -> str:
        """The name of its runs' folders."""
        settings = [f"labels{100 * self.label_share:g}", self.form or "alone"]
        if self.form is not None:
            settings += [f"weight{self.teacher_weight:g}"] if self.label_share else []
            settings += [f"temperature{self.temperature:g}"]
        return "-".join([*settings, *([] if self.mixup else ["unmixed"])])


ALONE, DISTILLED, TAUGHT = Condition(form=None), Condition(), Condition(label_share=0.0)
SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)

PARTS: dict[str, dict[str, Condition]] = {
    "labels": {
        f"{100 * share:g} % of the labels, {'distilled' if form else 'alone'}": Condition(label_share=share, form=form)
        for share in SHARES
        for form in ((None, "whole") if share else ("whole",))
    },
    "weight": {
        "0 (labels alone)": ALONE,
        **{f"{weight:g}": Condition(teacher_weight=weight) for weight in (0.5, 0.9)},
        "1 (teachers alone)": TAUGHT,  # the same loss, whatever labels there are
    },
    "temperature": {f"{value:g}": Condition(temperature=value) for value in (1.0, 2.0, 4.0)},
    "form": {"whole": DISTILLED, "20 largest": Condition(form="top20"), "4 views": Condition(form="views4")},
    "mixup": {
        f"{name}, {'mixup' if mixup else 'no mixup'}": replace(condition, mixup=mixup)
        for mixup in (True, False)
        for name, condition in (
            ("labels alone", ALONE),
            ("distilled", Condition(teacher_weight=0.9)),
            ("teachers alone", TAUGHT),
        )
    },
}
"""Part of the study → what each of its rows is called → the condition; one that is in several is trained once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A dataset in AudioSet's layout, the teachers, and where everything is kept."""

    data: Path
    out: Path
    recipe: Path
    teachers: tuple[str, ...]
    store: Path | None
    """A store of both parts' clips, or Parquet to import; None is what the teachers say."""
    held: str
    epochs: int | None
    """Of a run on all clips; None is the recipe's."""
    seeds: tuple[int, ...]
    parts: tuple[str, ...]
    label_share: float = 1.0
    """Share of the labels in the other parts than "labels", above 0 and at most 1."""
    jobs: int
    """Runs side by side, each on an even share of the cores."""
    record: StudyRecord
    """What is finished, here or elsewhere."""

    @property
    def rows(self) -> dict[str, dict[str, Condition]]:
        """The parts that are wanted; views exist only of teachers that are at hand."""

        def labelled_as_wanted(part: str, condition: Condition) -> Condition:
            has_all = part != "labels" and condition.label_share == 1.0
            return replace(condition, label_share=self.label_share) if has_all else condition

        return {
            part: {
                name: labelled_as_wanted(part, condition)
                for name, condition in PARTS[part].items()
                if condition.form != "views4" or self.store is None
            }
            for part in self.parts
        }

    @property
    def conditions(self) -> list[Condition]:
        """All that have to be trained."""
        return list(dict.fromkeys(condition for rows in self.rows.values() for condition in rows.values()))

    def prepare(self) -> None:
        """Make both datasets and all stores, as far as they are not there."""
        for name, segments in DATASETS.items():
            if not (self.out / name / "manifest.parquet").exists():
                lists = ["--segments", str(self.data / segments), "--audio", str(self.data / "audio")]
                pipeline("ingest", "audioset", *lists, "--out", str(self.out / name), "--clips-per-shard", "128")
            self._make_store(name)
        forms = {condition.form for condition in self.conditions}
        whole = str(self.logits("train"))
        if "top20" in forms and not (self.logits("train", "top20") / "store.json").exists():
            pipeline("reweight", whole, "--out", str(self.logits("train", "top20")), "--top-k", "20")
        if "views4" in forms:
            where = ["--data", str(self.out / "train"), "--store", str(self.logits("train", "views4"))]
            pipeline("teacher-logits", *where, "--views", "4", "--teacher", *self.teachers)

    def _make_store(self, name: str) -> None:
        where = ["--data", str(self.out / name), "--store", str(self.logits(name))]
        if self.store is None:
            pipeline("teacher-logits", *where, "--teacher", *self.teachers)
        elif self.logits(name) != self.store:
            pipeline("import-logits", "--parquet", str(self.store), "--held", self.held, *where)

    def logits(self, name: str, form: str = "whole") -> Path:
        """Returns the store of a dataset's logits."""
        if form == "whole" and self.store is not None and (self.store / "store.json").exists():
            return self.store
        return self.out / f"{name}-logits{'' if form == 'whole' else f'-{form}'}"

    def run(self, condition: Condition, seed: int) -> None:
        """Train one student, or go on with it."""
        folder, started = self.folder(condition, seed), time.monotonic()
        flags = ["--config", str(self.recipe), "--seed", str(seed), "--run", str(folder)]
        flags += ["--data", str(self.out / "train"), "--eval-data", str(self.out / "eval")]
        flags += ["--cache", str(self.out / "cache"), *self.flags(condition)]
        if condition.form is not None:
            flags += ["--store", str(self.logits("train", condition.form))]
        threads = max(1, usable_cores() // self.jobs)
        resume = ["--resume"] if folder.exists() else []
        with (self.out / f"{folder.name}.log").open("a") as log:
            pipeline("train-student", *flags, *resume, threads=threads, log=log)
        lines = [line for line in read_metrics(folder) if "eval/mAP" in line]
        key = self.key(condition, seed)
        self.record.add(key, folder.name, [(line["step"], line["eval/mAP"]) for line in lines])
        minutes = (time.monotonic() - started) / 60
        print(f"{folder.name}: mAP {self.curve(condition, seed)[-1][1]:.4f}, {minutes:.1f} minutes", flush=True)

    def flags(self, condition: Condition) -> list[str]:
        """Returns the settings of `pipeline train-student` as flags; all conditions make about equally many steps."""
        flags = ["--label-share", str(condition.label_share), *([] if condition.mixup else ["--mixup.alpha", "0"])]
        if condition.form is not None:
            if condition.label_share:  # without a label all of the loss is the logits'
                flags += ["--distill.teacher-weight", str(condition.teacher_weight)]
            flags += ["--distill.temperature", str(condition.temperature)]
        manifest = read_manifest(self.out / "train")
        clips = len(manifest) if condition.form is not None else labelled(manifest, condition.label_share)
        return [*flags, *self.length(len(manifest), clips)]

    def length(self, all_clips: int, clips: int) -> list[str]:
        """Returns the flags that give a run on some of the clips as many steps as one on all, on the same curve."""
        recipe: dict[str, Any] = tomllib.loads(self.recipe.read_text())
        batch, schedule = recipe.get("batch_size", 120), student.ScheduleConfig(**recipe.get("schedule", {}))
        epochs, own_batch = self.epochs or recipe.get("epochs", 200), min(batch, clips)
        longer = (all_clips // batch) / (clips // own_batch)  # so many more epochs
        stretch = longer * epochs / recipe.get("epochs", 200)
        return [
            *("--epochs", str(max(1, round(epochs * longer))), "--batch-size", str(own_batch)),
            *("--evaluate-every", str(max(1, round(recipe.get("evaluate_every", 1) * stretch)))),
            *("--schedule.warmup-epochs", f"{schedule.warmup_epochs * stretch:g}"),
            *("--schedule.ramp-down-start-epoch", f"{schedule.ramp_down_start_epoch * stretch:g}"),
            *("--schedule.ramp-down-epochs", f"{schedule.ramp_down_epochs * stretch:g}"),
        ]

    def folder(self, condition: Condition, seed: int) -> Path:
        """Returns the run folder of one student."""
        return self.out / f"{condition.folder}-seed{seed}"

    def key(self, condition: Condition, seed: int) -> str:
        """Returns what names one student in the record."""
        recipe = tomllib.loads(self.recipe.read_text())
        logits = None if condition.form is None else self.logits("train", condition.form)
        return key_of(recipe, self.flags(condition), seed, [self.out / name for name in DATASETS], logits)

    def curve(self, condition: Condition, seed: int) -> Curve:
        """Returns the evaluations of one student; the study reports the last one."""
        return self.record.curve(self.key(condition, seed))

    def is_finished(self, condition: Condition, seed: int) -> bool:
        """Whether a run has come to its end."""
        return self.key(condition, seed) in self.record

    def teachers_map(self) -> float:
        """Returns the mAP of the stored logits on the evaluation clips, 0 to 1."""
        report = self.out / "teachers"
        where = ["--data", str(self.out / "eval"), "--store", str(self.logits("eval")), "--out", str(report)]
        pipeline("evaluate", *where)
        return json.loads((report / "report.json").read_text())["systems"][0]["mAP"]

    def student_macs(self) -> int:
        """Returns the multiplications of the student for a clip of its input length."""
        recipe: dict[str, Any] = tomllib.loads(self.recipe.read_text())
        return student.count_complexity(student.create_model(recipe["model"], **recipe.get("model_options", {}))).macs

    def teacher_macs(self) -> float:
        """Returns the multiplications of all teachers for a clip; only of those at hand is that known."""
        cards = [teacher.model_card(spec.partition("=")[0].partition("@")[0]) for spec in self.teachers]
        return sum(teacher.count_complexity(card).flops / 2 for card in cards)


def labelled(manifest: Manifest, share: float) -> int:
    """Returns how many clips keep their labels."""
    return int(np.count_nonzero(~manifest.with_label_share(share).unlabelled))


def pipeline(*arguments: str, threads: int | None = None, log: IO[str] | None = None) -> None:
    """Run one command; its output goes to `log`, or is shown.

    Raises:
        PipelineError: it failed.
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
        where = f"; see {log.name}" if log else ""
        raise PipelineError(f"pipeline {' '.join(arguments)} ended with {done.returncode}{where}")


def results(study: Study, part: str) -> list[Result]:
    """Returns the conditions of a part with the seeds that are finished in all that they are compared with.

    In "labels" that is what has as many labels, elsewhere every setting of the part of which anything is finished.
    """
    rows = study.rows[part]
    if part != "labels":
        rows = {name: one for name, one in rows.items() if any(study.is_finished(one, seed) for seed in study.seeds)}

    def compared(condition: Condition) -> list[Condition]:
        return [one for one in rows.values() if part != "labels" or one.label_share == condition.label_share]

    found = [
        Result(
            name=name,
            label_share=condition.label_share,
            with_store=condition.form is not None,
            curves={
                seed: study.curve(condition, seed)
                for seed in study.seeds
                if all(study.is_finished(one, seed) for one in compared(condition))
            },
        )
        for name, condition in rows.items()
    ]
    return [result for result in found if result.curves]


def conclude(study: Study, teacher_macs: float | None) -> None:
    """Write the report of what is finished."""
    parts: dict[str, list[Result]] = {}
    for part in study.parts:
        fewer = part != "labels" and study.label_share < 1
        title = f"{part}, {100 * study.label_share:g} % of the labels" if fewer else part
        if found := results(study, part):
            parts[title] = found
        else:
            print(f"{title}: no seed is finished in all conditions yet", flush=True)
    if not teacher_macs and study.store is None:
        teacher_macs = study.teacher_macs()
    if parts:
        write_report(study.out / "report", parts, study.teachers_map(), study.student_macs(), teacher_macs)


def read_options() -> tuple[Study, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with AudioSet's CSV files and audio/")
    parser.add_argument("--out", type=Path, required=True, help="folder for datasets, stores, runs and the report")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe of the student")
    parser.add_argument("--teacher", nargs="+", default=(), help="as for pipeline teacher-logits")
    parser.add_argument("--store", type=Path, help="in place of teachers: a store of all clips, or Parquet to import")
    parser.add_argument("--held", default="logits", choices=("logits", "probabilities"), help="what such Parquet holds")
    parser.add_argument("--teacher-macs", type=float, help="multiplications of an imported teacher for a clip")
    parser.add_argument("--parts", nargs="+", default=["labels"], choices=tuple(PARTS), help="what is compared")
    parser.add_argument("--label-share", type=float, default=1.0, help="in all parts but labels, 1 or less; 1")
    parser.add_argument("--epochs", type=int, help="of a run on all clips; the recipe's, with its schedule stretched")
    parser.add_argument("--seeds", type=int, default=3, help="students a condition, 1 or more")
    parser.add_argument("--jobs", type=int, default=2, help="students trained side by side, 1 or more")
    parser.add_argument("--record", type=Path, help="keeps what is finished; OUT/record.jsonl")
    parser.add_argument("--report", action="store_true", help="train nothing; report what is finished")
    options = parser.parse_args()
    if not options.teacher and options.store is None:
        parser.error("give --teacher or --store")
    if not 0 < options.label_share <= 1:
        parser.error(f"--label-share is {options.label_share}; choose one above 0 and at most 1")
    study = Study(
        data=options.data,
        out=options.out,
        recipe=options.recipe,
        teachers=tuple(options.teacher),
        store=options.store,
        held=options.held,
        epochs=options.epochs,
        seeds=tuple(range(options.seeds)),
        parts=tuple(options.parts),
        label_share=options.label_share,
        jobs=options.jobs,
        record=StudyRecord(options.record or options.out / "record.jsonl"),
    )
    return study, options


def train(study: Study) -> list[str]:
    """Train all students, seed by seed; returns what went wrong, one line a run."""
    unfinished = [
        (condition, seed)
        for seed in study.seeds
        for condition in study.conditions
        if not study.is_finished(condition, seed)
    ]
    faults: list[str] = []
    with ThreadPoolExecutor(study.jobs) as pool:
        for run in [pool.submit(study.run, condition, seed) for condition, seed in unfinished]:
            try:
                run.result()
            except PipelineError as error:
                print(error, flush=True)
                faults.append(str(error))
    return faults


def main() -> None:
    """Prepare, train, report; a run that fails ends neither the others nor the report."""
    study, options = read_options()
    study.out.mkdir(parents=True, exist_ok=True)
    study.prepare()
    faults = [] if options.report else train(study)
    conclude(study, options.teacher_macs)
    if faults:
        raise SystemExit(f"{len(faults)} runs failed; the same command goes on with them")


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        raise SystemExit(f"error: {error}") from error
