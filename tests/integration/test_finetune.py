import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import published_layouts as layouts
import pytest
import torch
from fixed_logits import FixedLogits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import student
from pipeline.batches.join import TrainingBatch
from pipeline.commands import (
    evaluate,
    finetune_dataset,
    finetune_dcase20,
    finetune_esc50,
    finetune_fsd50k,
    finetune_openmic,
    tag,
)
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.ingest.fsd50k import Fsd50k
from pipeline.ingest.ingesting import IngestConfig, ingest
from pipeline.runtime.progress import read_metrics
from pipeline.runtime.recipes import to_toml
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.finetuning import FinetuneAugmentConfig, FinetuneConfig, FinetuneLearner, WavmixConfig
from pipeline.verification.inspection import summarise_run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "model": "mn01",
    "epochs": 3,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "clip_seconds": 0.5,
    "checkpoint_minutes": 0,
}


def esc50(folder: Path, source: Path, **settings: Any) -> finetune_esc50.FinetuneEsc50Config:
    """Two of the five folds."""
    small = {
        **SMALL,
        "batch_size": 8,
        "only": ("fold1", "fold2"),
        "cache": str(folder / "cache"),
        **settings,
    }
    return finetune_esc50.FinetuneEsc50Config(source=str(source), run=str(folder / "run"), **small)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.esc50(tmp_path_factory.mktemp("esc50"))


@pytest.fixture(scope="module")
def straight(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    assert finetune_esc50.run(esc50(folder, clips)).finished
    return folder / "run"


def test_each_fold_is_tested_on_what_it_did_not_learn_from_and_the_mean_is_kept(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    assert (summary["set"], summary["task"], summary["measure"]) == ("esc50", "single-label", "accuracy")
    assert (list(summary["rounds"]), summary["missing"]) == (["fold1", "fold2"], ["fold3", "fold4", "fold5"])
    last = [read_metrics(straight / fold)[-1]["eval/accuracy"] for fold in ("fold1", "fold2")]
    assert [metrics["accuracy"] for metrics in summary["rounds"].values()] == last
    assert summary["mean"] == pytest.approx(sum(last) / 2)
    assert all(metrics["clips"] == 4 for metrics in summary["rounds"].values())
    assert len(read_manifest(straight / "data" / "fold1")) == 4
    lines = [line for line in read_metrics(straight / "fold1") if "eval/accuracy" in line]
    best = max(lines, key=lambda line: line["eval/accuracy"])
    shown = summarise_run(straight / "fold1")
    assert (shown.best_accuracy, shown.best_accuracy_epoch) == (best["eval/accuracy"], best["epoch"])
    whole = summarise_run(straight)
    assert (whole.measure, list(whole.rounds.values())) == ("accuracy", last)


def test_a_killed_fold_goes_on_to_the_same_bits_and_finished_folds_are_left_alone(
    clips: Path, straight: Path, tmp_path: Path
) -> None:
    config = esc50(tmp_path, clips)
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline", "finetune", "esc50", "--config", str(tmp_path / "recipe.toml")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    second = tmp_path / "run" / "fold2"
    while not (second.exists() and list_checkpoints(second)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert list(json.loads((tmp_path / "run/summary.json").read_text())["rounds"]) == ["fold1"]
    finished = load_file(tmp_path / "run/fold1/last.safetensors")
    shutil.rmtree(tmp_path / "run/fold1")
    with pytest.raises(UsageError, match="--resume"):
        finetune_esc50.run(config)
    with pytest.raises(UsageError, match="label_smoothing"):
        finetune_esc50.run(replace(config, resume=True, label_smoothing=0.1))
    result = finetune_esc50.run(replace(config, resume=True))
    assert not (tmp_path / "run/fold1").exists()  # its metrics are kept, and nobody needs it any more
    assert result.rounds == json.loads((straight / "summary.json").read_text())["rounds"]
    for fold, ours in (("fold1", finished), ("fold2", load_file(second / "last.safetensors"))):
        theirs = load_file(straight / fold / "last.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_single_label_weights_tag_with_a_softmax_and_are_evaluated_by_accuracy(
    straight: Path, clips: Path, tmp_path: Path
) -> None:
    last = str(straight / "fold1" / "last.safetensors")
    sound = str(clips / "ESC-50-master/audio/1-100000-A-0.wav")
    with safe_open(last, framework="pt") as file:
        sure = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sure["classifier.5.bias"] = torch.tensor([2.0, -1.0])
        sure["classifier.5.weight"].zero_()
        save_file(sure, tmp_path / "sure.safetensors", file.metadata())
    (window,) = tag.run(tag.TagConfig((sound,), checkpoint=str(tmp_path / "sure.safetensors"), device="cpu"))
    first, second = torch.tensor([2.0, -1.0]).softmax(dim=0).tolist()
    assert window.tags == (("rooster", pytest.approx(first)), ("crying baby", pytest.approx(second)))
    data, out = str(straight / "data" / "fold1"), str(tmp_path)
    report = evaluate.run(evaluate.EvaluateConfig(data=data, checkpoint=(last,), out=out, device="cpu", workers=0))
    metrics = json.loads((straight / "summary.json").read_text())["rounds"]["fold1"]
    assert report.systems[0].accuracy == metrics["accuracy"]
    assert report.systems[0].mean_average_precision == pytest.approx(metrics["mAP"], abs=1e-6)
    assert json.loads((tmp_path / "report.json").read_text())["systems"][0]["accuracy"] == metrics["accuracy"]


def test_fsd50k_tests_the_best_weights_of_the_validation_split_on_the_evaluation_set(tmp_path: Path) -> None:
    source = layouts.fsd50k(tmp_path / "source")
    settings = {**SMALL, "epochs": 2, "cache": str(tmp_path / "cache"), "data": str(tmp_path / "data")}
    config = finetune_fsd50k.FinetuneFsd50kConfig(source=str(source), run=str(tmp_path / "run"), **settings)
    result = finetune_fsd50k.run(config)
    assert (result.finished, result.measure) == (True, "mAP")
    metrics = result.rounds["split"]
    assert {"mAP", "mAP_micro", "roc_auc", "clips", "best_mAP_on_val"} <= metrics.keys()
    best, data = str(tmp_path / "run/split/best.safetensors"), str(tmp_path / "data/eval")
    report = evaluate.run(evaluate.EvaluateConfig(data=data, checkpoint=(best,), device="cpu", workers=0))
    assert report.systems[0].mean_average_precision == pytest.approx(metrics["mAP"], abs=1e-6)
    assert report.systems[0].accuracy is None


@pytest.mark.parametrize(
    ("module", "config", "make", "measure", "clips"),
    [
        (finetune_openmic, finetune_openmic.FinetuneOpenMicConfig, layouts.openmic, "mAP", 4),
        (finetune_dcase20, finetune_dcase20.FinetuneDcase20Config, layouts.tau_urban, "accuracy", 2),
    ],
    ids=["openmic", "dcase20"],
)
def test_the_other_sets_train_and_need_no_source_a_second_time(
    module: Any, config: Any, make: Any, measure: str, clips: int, tmp_path: Path
) -> None:
    settings = {**SMALL, "epochs": 1, "cache": str(tmp_path / "cache"), "data": str(tmp_path / "data")}
    with pytest.raises(UsageError, match="give --source"):
        module.run(config(run=str(tmp_path / "no"), **settings))
    result = module.run(config(source=str(make(tmp_path / "set")), run=str(tmp_path / "run"), **settings))
    (metrics,) = result.rounds.values()
    assert (result.measure, metrics["clips"]) == (measure, clips)
    again = module.run(config(run=str(tmp_path / "again"), **settings))
    assert again.rounds == result.rounds


def test_any_dataset_is_taken_for_what_its_labels_are(straight: Path, tmp_path: Path) -> None:
    data, settings = str(straight / "data" / "fold1"), {**SMALL, "epochs": 1, "cache": str(tmp_path / "cache")}
    config = finetune_dataset.FinetuneDatasetConfig(data=data, eval_data=data, run=str(tmp_path / "one"), **settings)
    finetune_dataset.run(config)
    assert "eval/accuracy" in read_metrics(tmp_path / "one")[-1]
    finetune_dataset.run(replace(config, task="multi-label", run=str(tmp_path / "many")))
    assert "eval/accuracy" not in read_metrics(tmp_path / "many")[-1]
    several = layouts.fsd50k(tmp_path / "fsd50k")
    ingest(IngestConfig(out=str(tmp_path / "train"), name="train"), Fsd50k().source(several, "train"))
    with pytest.raises(UsageError, match="have no class or several"):
        finetune_dataset.run(replace(config, data=str(tmp_path / "train"), task="single-label"))


def test_wrong_settings_are_told_before_a_set_is_copied(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fold9.*fold1, fold2"):
        finetune_esc50.run(esc50(tmp_path, clips, only=("fold9",)))
    for name, wrong in (("ranks", 2), ("model", "mn99x"), ("clip_seconds", 0.0), ("label_smoothing", 1.0)):
        with pytest.raises(UsageError, match=name):
            esc50(tmp_path, clips, **{name: wrong})
    with pytest.raises(UsageError, match=r"has no meta/esc50\.csv"):
        finetune_esc50.run(esc50(tmp_path, tmp_path))
    assert not (tmp_path / "run").exists()


def batch_of(labels: torch.Tensor, label_mask: torch.Tensor | None) -> TrainingBatch:
    clips, classes = labels.shape
    return TrainingBatch(
        rows=torch.arange(clips),
        waveforms=torch.randn(clips, 8000, generator=torch.Generator().manual_seed(0)),
        labels=labels,
        teacher_logits=torch.zeros(clips, classes),
        has_teacher=torch.zeros(clips, dtype=torch.bool),
        valid=torch.ones(clips, dtype=torch.bool),
        label_mask=label_mask,
        positions=torch.arange(clips),
        global_batch_size=clips,
    )


STILL = {
    "wavmix": WavmixConfig(alpha=0),
    "mixup": student.MixupConfig(alpha=0),
    "augment": FinetuneAugmentConfig(roll_samples=0, gain_db=0),
}


def learner(task: Any, classes: int, **settings: Any) -> FinetuneLearner:
    config = FinetuneConfig(data="d", run="r", **settings)
    return FinetuneLearner(student.create_model("mn01", num_classes=classes), task, config)


def test_classes_that_nobody_judged_teach_nothing_mixed_or_not() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    label_mask = torch.tensor([[True, True, False], [True, True, False], [False, True, False], [True, True, False]])
    for settings in (STILL, {}):
        says = FixedLogits(nn.Parameter(torch.linspace(-2, 2, 12).view(4, 3)))
        learner("multi-label", 3, **settings).loss(says, batch_of(labels, label_mask), torch.Generator()).backward()
        assert says.logits.grad is not None
        assert says.logits.grad[:, 2].abs().max() == 0  # even where it is called positive
        assert says.logits.grad[:, 1].abs().min() > 0
        if settings:
            assert says.logits.grad[2, 0] == 0
            expected = nn.functional.binary_cross_entropy_with_logits(says.logits, labels, reduction="none")
            loss = learner("multi-label", 3, **STILL).loss(says, batch_of(labels, label_mask), torch.Generator())
            torch.testing.assert_close(loss, (expected * label_mask).mean())


def test_single_label_loss_is_cross_entropy_with_targets_mixed_as_the_sounds_are() -> None:
    labels, says = torch.eye(4), FixedLogits(nn.Parameter(torch.linspace(-2, 2, 16).view(4, 4)))
    smooth = learner("single-label", 4, **STILL, label_smoothing=0.1)
    still = smooth.loss(says, batch_of(labels, None), torch.Generator())
    torch.testing.assert_close(still, nn.functional.cross_entropy(says.logits, torch.arange(4), label_smoothing=0.1))
    only_mixup = {**STILL, "mixup": student.MixupConfig(alpha=0.3)}
    found = learner("single-label", 4, **only_mixup).loss(
        says, batch_of(labels, None), torch.Generator().manual_seed(5)
    )
    randomness = student.Randomness.of_batch(4, torch.Generator().manual_seed(5))
    student.draw_mix(randomness, STILL["wavmix"], distance=2)  # pyright: ignore[reportArgumentType]
    mix = student.draw_mix(randomness, only_mixup["mixup"])  # pyright: ignore[reportArgumentType]
    each = [
        nn.functional.cross_entropy(says.logits, target, reduction="none") for target in (torch.arange(4), mix.partner)
    ]
    torch.testing.assert_close(found, (mix.lam * each[0] + (1 - mix.lam) * each[1]).mean())


def test_scores_leave_out_what_nobody_judged_and_accuracy_is_of_the_highest_probability() -> None:
    logits = np.array([[2.0, 0.0], [1.0, 3.0], [5.0, 4.0], [0.0, 1.0]], np.float32)
    one = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], np.float32)
    single = learner("single-label", 2)
    assert single.best_metric == "accuracy"
    assert single.score(logits, one)["accuracy"] == 0.5
    label_mask = np.array([[True, True], [True, True], [False, True], [False, True]])
    scores = learner("multi-label", 2).score(logits, one, label_mask)
    assert scores["mAP"] == 1.0
    assert learner("multi-label", 2).score(logits, one)["mAP"] < 1
