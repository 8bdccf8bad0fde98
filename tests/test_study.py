"""The study compares what can be compared: as many steps for all, seed by seed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_stores import fill_store, stamp_for

from benchmarks.study import ALONE, DISTILLED, PARTS, TAUGHT, Condition, Study, results
from benchmarks.study_record import StudyRecord, key_of
from benchmarks.study_report import Result, gain, label_table, write_report
from pipeline.batches.sampling import build_sampler
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp

RECIPE = """
model = "mn02"
epochs = 10
batch_size = 8
evaluate_every = 2

[schedule]
warmup_epochs = 1
ramp_down_start_epoch = 4
ramp_down_epochs = 5
"""


@pytest.fixture
def study(tmp_path: Path, make_dataset: Callable[..., Path]) -> Study:
    make_dataset(tmp_path / "train", clips=64)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return Study(
        data=tmp_path,
        out=tmp_path,
        recipe=tmp_path / "recipe.toml",
        teachers=(),
        store=tmp_path / "logits.parquet",
        held="logits",
        epochs=20,
        seeds=(0, 1),
        parts=tuple(PARTS),
        jobs=1,
        record=StudyRecord(tmp_path / "record.jsonl"),
    )


def flags_of(study: Study, condition: Condition) -> dict[str, str]:
    flags = study.flags(condition)
    return dict(zip(flags[::2], flags[1::2], strict=True))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
def test_few_labels_alone_get_as_many_steps_on_the_same_curve(study: Study, share: float) -> None:
    manifest = read_manifest(study.out / "train").with_label_share(share)
    flags = flags_of(study, Condition(label_share=share, form=None))
    sampler = build_sampler(manifest, sampling="uniform", batch_size=int(flags["--batch-size"]))
    steps = int(flags["--epochs"]) * sampler.steps_per_epoch
    assert steps == pytest.approx(20 * 8, rel=0.05)
    peak_ends = float(flags["--schedule.ramp-down-start-epoch"]) / int(flags["--epochs"])
    assert peak_ends == pytest.approx(0.4, rel=0.05)
    assert flags["--label-share"] == str(share)
    assert "--distill.teacher-weight" not in flags


def test_what_has_a_store_learns_from_all_clips_whatever_labels_there_are(study: Study) -> None:
    for condition in (DISTILLED, TAUGHT):
        flags = flags_of(study, condition)
        assert (flags["--epochs"], flags["--batch-size"]) == ("20", "8")


def test_without_labels_there_is_no_weight_of_the_teacher_to_choose(study: Study) -> None:
    weights = (0.5, 0.9)
    none, half = ([Condition(label_share=share, teacher_weight=weight) for weight in weights] for share in (0.0, 0.5))
    assert none[0].folder == none[1].folder
    assert study.flags(none[0]) == study.flags(none[1])
    assert "--distill.teacher-weight" not in flags_of(study, none[0])
    assert [flags_of(study, one)["--distill.teacher-weight"] for one in half] == ["0.5", "0.9"]


def test_each_condition_is_trained_once_in_a_folder_of_its_own(study: Study) -> None:
    folders = [condition.folder for condition in study.conditions]
    assert len(set(folders)) == len(folders)
    assert sum(condition == ALONE for condition in study.conditions) == 1
    assert not any(condition.form == "views4" for condition in study.conditions)  # nobody can view imported teachers


def test_a_run_is_known_by_what_it_was_made_from_and_the_record_travels(study: Study, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "train", tmp_path / "eval")
    manifest = read_manifest(tmp_path / "train")
    logits = np.zeros((64, len(manifest.vocabulary)), np.float16)
    fill_store(tmp_path / "train-logits", manifest, logits)
    names = {(condition, seed): study.key(condition, seed) for condition in (ALONE, DISTILLED) for seed in (0, 1)}
    assert len(set(names.values())) == 4
    fill_store(tmp_path / "other-logits", manifest, logits + 1)
    stores = (None, tmp_path / "train-logits", tmp_path / "other-logits")
    assert len({key_of({}, [], 0, [tmp_path / "train"], store) for store in stores}) == 3
    study.record.add(names[DISTILLED, 1], "some run", [(10, 0.25), (20, 0.5)])

    (tmp_path / "recipe.toml").write_text(f"# the same, but for a comment\n{RECIPE}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train", "eval", "train-logits", "recipe.toml"):
        (tmp_path / name).rename(elsewhere / name)
    shutil.copy(tmp_path / "record.jsonl", elsewhere / "record.jsonl")
    record = StudyRecord(elsewhere / "record.jsonl")
    moved = replace(study, out=elsewhere, recipe=elsewhere / "recipe.toml", record=record)
    assert moved.curve(DISTILLED, 1) == [(10, 0.25), (20, 0.5)]
    assert [moved.is_finished(DISTILLED, 0), moved.is_finished(ALONE, 1)] == [False, False]
    assert not replace(moved, epochs=21).is_finished(DISTILLED, 1)
    (elsewhere / "recipe.toml").write_text(RECIPE.replace("mn02", "mn04"))
    assert not moved.is_finished(DISTILLED, 1)


def test_a_run_is_known_by_the_views_that_it_saw(study: Study, tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path / "train")
    whole = np.zeros((64, len(manifest.vocabulary)), np.float16)
    fill_store(tmp_path / "whole", manifest, whole)
    stamp = replace(stamp_for(manifest), views=ViewsStamp(count=2, config=ViewConfig()))
    for name, second in (("views", whole + 1), ("other-views", whole + 2)):
        fill_store(tmp_path / name, manifest, np.stack([whole, second], axis=1), stamp=stamp)
    stores = [tmp_path / name for name in ("whole", "views", "other-views")]
    assert len({key_of({}, [], 0, [tmp_path / "train"], store) for store in stores}) == 3


def test_a_record_that_was_cut_off_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    for key in ("first", "torn"):
        StudyRecord(path).add(key, f"run {key}", [(10, 0.25)])
    path.write_text(path.read_text()[:-20])
    StudyRecord(path).add("third", "run third", [(10, 0.5)])
    assert [key in StudyRecord(path) for key in ("first", "torn", "third")] == [True, False, True]


def test_a_row_has_the_seeds_that_are_finished_in_what_it_is_compared_with(study: Study, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "train", tmp_path / "eval")
    manifest = read_manifest(tmp_path / "train")
    fill_store(tmp_path / "train-logits", manifest, np.zeros((64, len(manifest.vocabulary)), np.float16))
    few = [Condition(label_share=0.25, form=form) for form in (None, "whole")]
    double = Condition(temperature=2.0)
    finished = [
        (ALONE, 0),
        (DISTILLED, 0),
        (ALONE, 1),
        (DISTILLED, 1),
        (few[0], 0),
        (few[1], 1),
        (TAUGHT, 1),
        (double, 1),
    ]
    for condition, seed in finished:
        study.record.add(study.key(condition, seed), condition.folder, [(10, 0.25)])
    seeds = {result.name: list(result.curves) for result in results(study, "labels")}
    assert seeds == {
        "100 % of the labels, alone": [0, 1],
        "100 % of the labels, distilled": [0, 1],
        "0 % of the labels, distilled": [1],  # of a quarter no seed has both
    }
    temperatures = {result.name: list(result.curves) for result in results(study, "temperature")}
    assert temperatures == {"1": [1], "2": [1]}  # nothing is finished of 4
    study.record.add(study.key(Condition(temperature=4.0), 0), "4", [(10, 0.25)])
    assert results(study, "temperature") == []
    study.record.add(study.key(Condition(temperature=4.0), 1), "4", [(10, 0.25)])
    assert [list(result.curves) for result in results(study, "temperature")] == [[1], [1], [1]]


def test_settings_are_compared_with_as_many_labels_as_wanted(study: Study) -> None:
    few = replace(study, label_share=0.25)
    assert few.rows["labels"] == study.rows["labels"]
    weights = list(few.rows["weight"].values())
    assert [one.label_share for one in weights] == [0.25, 0.25, 0.25, 0.0]  # the teachers alone need no label
    assert [one.teacher_weight for one in weights[1:3]] == [0.5, 0.9]
    assert [(one.label_share, one.temperature) for one in few.rows["temperature"].values()] == [
        (0.25, 1.0),
        (0.25, 2.0),
        (0.25, 4.0),
    ]


def result(name: str, share: float, with_store: bool, *finals: float) -> Result:
    curves = {seed: [(10.0, 0.1), (20.0, final)] for seed, final in enumerate(finals)}
    return Result(name=name, label_share=share, with_store=with_store, curves=curves)


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    alone, taught = result("a", 1.0, False, 0.3, 0.5), result("b", 1.0, True, 0.4, 0.55)
    assert gain(taught, alone) == "+0.0750 ± 0.0354 (2 of 2)"
    assert gain(result("a third seed", 1.0, True, 0.4, 0.55, 0.9), alone) == gain(taught, alone)
    none = result("c", 0.0, True, 0.2, 0.3)
    *_, all_labels, no_label = label_table([alone, taught, none], 0.6)
    assert all_labels == (
        "| 100 % | 2 | 0.4000 ± 0.1414 | 0.4750 ± 0.1061 | +0.0750 ± 0.0354 (2 of 2) | 79 % "
        "| +0.0750 ± 0.0354 (2 of 2) |"
    )
    assert no_label.startswith("| 0 % | 2 |  | 0.2500 ± 0.0707 |  | 42 % | -0.1500 ± 0.0707 (0 of 2)")
    one_seed = result("d", 0.5, True, 0.7)
    *_, half, _ = label_table([alone, taught, one_seed, none], 0.6)
    assert half == "| 50 % | 1 |  | 0.7000 |  | 117 % | +0.4000 (1 of 1) |"
    write_report(tmp_path / "report", {"labels": [alone, taught, none], "weight": [alone, taught]}, 0.6, 10**6, 10**9)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "study.md",
        "study.json",
        "study.png",
        "settings.png",
    }
