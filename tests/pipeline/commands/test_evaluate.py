import csv
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_stores import fill_store, stamp_for

import student
import teacher
from pipeline.commands.evaluate import EvaluateConfig, run
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import CheckpointError, LogitStoreError, ManifestError, TooManyFailuresError, UsageError
from pipeline.logits.stamp import ImportStamp, StoreStamp
from pipeline.logits.store import publish_part, write_stamp
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.report import EvaluationReport
from pipeline.training.checkpoints import save_weights

CLASSES = 5
COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
"""Keywords of a student that sees one frame in 50 ms: as real as any other, and quick."""
TinyClip = tuple[str, tuple[int, ...], bytes]


@pytest.fixture
def clips(make_noises: Callable[[int, int], list[TinyClip]]) -> list[TinyClip]:
    return make_noises(12, CLASSES)


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], clips: list[TinyClip]) -> Manifest:
    return build_dataset("data", clips)


def write_student(path: Path, vocabulary: Vocabulary, *, seed: int = 0, fill: float | None = None) -> str:
    torch.manual_seed(seed)
    model = student.create_model("mn01", num_classes=len(vocabulary), **COARSE)
    if fill is not None:
        for weight in model.parameters():
            torch.nn.init.constant_(weight, fill)
    metadata = {"stage": "student", "model": "mn01", "kwargs": COARSE, "classes": len(vocabulary)}
    save_weights(path, model.state_dict(), metadata | {"vocabulary_sha256": vocabulary.sha256})
    return str(path)


def logits_by_hand(path: str, clips: list[TinyClip]) -> np.ndarray:
    """(clips, classes), one clip at a time."""
    model = student.create_model("mn01", path, num_classes=CLASSES, **COARSE).eval()
    waveforms = [torch.from_numpy(load_waveform(audio, sample_rate_hz=32_000, seconds=10)) for _, _, audio in clips]
    with torch.inference_mode():
        return np.concatenate([model(model.front_end(waveform[None])).numpy() for waveform in waveforms])


def average_precision_by_hand(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean, over the positive clips, of the precision among the clips that score at least as high."""
    return float(np.mean([targets[scores >= scores[hit]].mean() for hit in np.flatnonzero(targets)]))


def roc_auc_by_hand(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative clip that are in the right order."""
    return float(np.mean(scores[targets == 1][:, None] > scores[targets == 0][None, :]))


def labels_of(clips: list[TinyClip]) -> np.ndarray:
    return np.array([[index in labels for index in range(CLASSES)] for _, labels, _ in clips], int)


def write_store(
    folder: Path, data: Manifest, logits: np.ndarray, left_out: tuple[int, ...] = (), reason: str = ""
) -> str:
    """Publish logits by manifest row; the clips left out are failures where a reason is given."""
    ids = [data.clip_ids[row].as_py() for row in left_out]
    failed = dict.fromkeys(ids, reason) if reason else {}
    fill_store(folder, data, logits, stamp=stamp_for(data, "x", "y"), failed=failed, absent=ids)
    return str(folder)


def evaluate(data: Manifest, *checkpoints: str, **settings: Any) -> EvaluationReport:
    defaults: dict[str, Any] = {"data": data.location, "checkpoint": checkpoints, "workers": 0, "batch_size": 5}
    return run(EvaluateConfig(**(defaults | settings)))


def test_scores_equal_those_computed_by_hand(data: Manifest, clips: list[TinyClip], tmp_path: Path) -> None:
    path = write_student(tmp_path / "small.safetensors", data.vocabulary)
    report = evaluate(data, path)
    logits, labels = logits_by_hand(path, clips), labels_of(clips)
    (system,) = report.systems
    present = np.flatnonzero(labels.sum(axis=0))
    precisions = [average_precision_by_hand(logits[:, index], labels[:, index]) for index in present]
    areas = [roc_auc_by_hand(logits[:, index], labels[:, index]) for index in present]
    np.testing.assert_allclose(system.average_precision[present], precisions, atol=1e-12)
    assert system.mean_average_precision == pytest.approx(np.mean(precisions))
    assert system.mean_roc_auc == pytest.approx(np.mean(areas))
    assert 0.2 < system.mean_average_precision < 0.99
    assert system.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_systems_are_resampled_on_the_same_draws(
    data: Manifest, clips: list[TinyClip], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_student(tmp_path / f"{seed}.safetensors", data.vocabulary, seed=seed) for seed in (1, 2)]
    report = evaluate(data, *paths, resampling=BootstrapConfig(bootstrap=20, seed=4))
    labels = labels_of(clips)
    draws = [np.random.default_rng([4, number]).integers(len(clips), size=len(clips)) for number in range(20)]
    for path, system in zip(paths, report.systems, strict=False):
        logits = logits_by_hand(path, clips)
        resampled = [student.tagging_scores(logits[drawn], labels[drawn]).mean_average_precision for drawn in draws]
        np.testing.assert_allclose(system.replicates, resampled, atol=1e-6)
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if "above" in line and "chance" in line]) == 2
    assert "95 % interval" in shown


def test_no_clip_is_drawn_anew_without_bootstrap(
    data: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_student(tmp_path / f"{seed}.safetensors", data.vocabulary, seed=seed) for seed in (1, 2)]
    report = evaluate(data, *paths, resampling=BootstrapConfig(bootstrap=0))
    assert report.replicates == 0
    assert "interval" not in capsys.readouterr().out


def test_classes_without_positives_are_left_out_and_counted(data: Manifest, tmp_path: Path) -> None:
    report = evaluate(data, write_student(tmp_path / "a.safetensors", data.vocabulary))
    assert report.positives[-1] == 0
    assert report.classes_scored == CLASSES - 1
    assert np.isnan(report.systems[0].average_precision[-1])


def test_several_checkpoints_are_scored_alone_and_as_the_mean_of_their_logits(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    paths = [write_student(tmp_path / f"{seed}.safetensors", data.vocabulary, seed=seed) for seed in (1, 2)]
    report = evaluate(data, *paths)
    assert [system.name for system in report.systems] == ["1", "2", "ensemble of 2"]
    assert report.system("2").average_precision[0] == pytest.approx(
        evaluate(data, paths[1]).systems[0].average_precision[0]
    )
    mean = np.mean([logits_by_hand(path, clips) for path in paths], axis=0)
    expected = average_precision_by_hand(mean[:, 0], labels_of(clips)[:, 0])
    assert report.system("ensemble of 2").average_precision[0] == pytest.approx(expected)


def test_thresholds_are_those_of_the_ensemble_and_maximise_f1(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    paths = [write_student(tmp_path / f"{seed}.safetensors", data.vocabulary, seed=seed) for seed in (0, 1)]
    evaluate(data, *paths, thresholds=str(tmp_path / "thresholds.csv"))
    logits = np.mean([logits_by_hand(path, clips) for path in paths], axis=0)
    probabilities, labels = 1 / (1 + np.exp(-logits)), labels_of(clips).astype(bool)
    with (tmp_path / "thresholds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mid"] for row in rows] == [label.mid for label in data.vocabulary.classes]
    for index, row in enumerate(rows):
        if not labels[:, index].any():
            assert row["threshold"] == ""
            continue
        tried = [probabilities[:, index] >= least for least in probabilities[:, index]]
        best = max(2 * (told & labels[:, index]).sum() / (told.sum() + labels[:, index].sum()) for told in tried)
        assert float(row["f1"]) == pytest.approx(best, rel=1e-4)


def test_batch_size_and_workers_change_nothing(data: Manifest, tmp_path: Path) -> None:
    path = write_student(tmp_path / "a.safetensors", data.vocabulary)
    alone, together = evaluate(data, path), evaluate(data, path, workers=2, batch_size=3)
    np.testing.assert_allclose(alone.systems[0].roc_auc, together.systems[0].roc_auc)


def test_a_teacher_and_a_student_share_a_table_at_their_own_rates(data: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = teacher.create_model("ast_tiny", num_classes=CLASSES)
    metadata = {"stage": "teacher", "model": "ast_tiny", "kwargs": {}, "classes": CLASSES}
    save_weights(
        tmp_path / "ast.safetensors", model.state_dict(), metadata | {"vocabulary_sha256": data.vocabulary.sha256}
    )
    paths = [write_student(tmp_path / "mn.safetensors", data.vocabulary), str(tmp_path / "ast.safetensors")]
    report = evaluate(data, *paths)
    assert [system.name for system in report.systems] == ["mn", "ast", "ensemble of 2"]


def test_a_store_is_scored_beside_the_student(data: Manifest, clips: list[TinyClip], tmp_path: Path) -> None:
    perfect = labels_of(clips) * 8.0 - 4
    store = write_store(tmp_path / "store", data, perfect)
    report = evaluate(data, write_student(tmp_path / "a.safetensors", data.vocabulary), store=store)
    assert [system.name for system in report.systems] == ["x + y", "a"]
    assert report.system("x + y").mean_average_precision == 1
    assert report.system("a").mean_average_precision < 1
    assert evaluate(data, store=store).systems[0].mean_roc_auc == 1


def write_form(folder: Path, data: Manifest, logits: np.ndarray, said: np.ndarray | None, **form: object) -> str:
    """Publish logits by manifest row as one part of another form."""
    plain = StoreStamp.from_json(Path(write_store(folder, data, logits), "store.json").read_bytes(), "")
    stamp = replace(plain, **form)  # pyright: ignore[reportArgumentType]
    for part in folder.glob("*.parquet"):
        part.unlink()
    write_stamp(str(folder), stamp)
    rows = np.repeat(logits, stamp.view_count, axis=0)
    rows[np.arange(len(rows)) % stamp.view_count > 0] = 0  # other views than the first know nothing
    publish_part(str(folder), "all", data.clip_ids.to_pylist(), rows, stamp, "", members=said)
    return str(folder)


def test_each_teacher_is_scored_where_the_store_keeps_what_it_said(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    perfect = (labels_of(clips) * 8.0 - 4).astype(np.float16)
    members = np.stack([perfect, np.zeros_like(perfect)])
    report = evaluate(data, store=write_form(tmp_path / "store", data, perfect, members, members="float16"))
    assert [system.name for system in report.systems] == ["x + y", "x", "y"]
    assert report.system("x").mean_average_precision == 1
    assert report.system("y").mean_average_precision < 0.9


def test_stores_of_other_forms_are_scored_by_the_clips_as_they_are(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    perfect = labels_of(clips) * 8.0 - 4
    views = write_form(tmp_path / "views", data, perfect, None, views=ViewsStamp(count=3, config=ViewConfig()))
    assert evaluate(data, store=views).systems[0].mean_average_precision == 1
    few = write_form(tmp_path / "few", data, perfect, None, top_k=CLASSES - 1)
    assert evaluate(data, store=few).systems[0].mean_average_precision == 1
    source = ImportStamp(layout="parquet", files=(), origin="", held="logits")
    imported = write_form(tmp_path / "imported", data, perfect, None, teachers=(), imported=source)
    assert [system.name for system in evaluate(data, store=imported).systems] == ["imported parquet"]


def test_all_systems_are_scored_on_the_clips_that_all_have(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", data, labels_of(clips) * 8.0, left_out=(0, 3))
    path = write_student(tmp_path / "a.safetensors", data.vocabulary)
    report = evaluate(data, path, store=store, max_failed=0.2)
    assert report.clips == 10
    assert report.failures == (("-clip.00", "no logits in the store"), ("-clip.03", "no logits in the store"))
    kept = [place for place in range(12) if place not in (0, 3)]
    expected = average_precision_by_hand(logits_by_hand(path, clips)[kept, 0], labels_of(clips)[kept, 0])
    assert report.system("a").average_precision[0] == pytest.approx(expected)


def test_a_half_finished_store_is_refused_with_the_reasons(
    data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", data, labels_of(clips) * 8.0, left_out=(4, 5, 6), reason="cut short")
    with pytest.raises(TooManyFailuresError, match=r"3 of 12 .*25.0 %, limit 1 %.*3 cut short.*-clip\.04"):
        evaluate(data, store=store)


def test_the_hash_of_the_ids_does_not_depend_on_their_order(
    build_dataset: Callable[..., Manifest], clips: list[TinyClip], data: Manifest, tmp_path: Path
) -> None:
    path = write_student(tmp_path / "a.safetensors", data.vocabulary)
    turned = build_dataset("turned", clips[::-1], clips_per_shard=7)
    report = evaluate(data, path)
    assert report.clip_ids_sha256 == evaluate(turned, path).clip_ids_sha256
    lines = "".join(sorted(f"{clip_id}\n" for clip_id, _, _ in clips))
    assert report.clip_ids_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    fewer = build_dataset("fewer", clips[1:])
    assert report.clip_ids_sha256 != evaluate(fewer, path).clip_ids_sha256


def test_undecodable_clips_are_counted_and_listed(
    build_dataset: Callable[..., Manifest], clips: list[TinyClip], tmp_path: Path
) -> None:
    clips[2] = ("broken", (0,), b"this is no sound at all")
    data = build_dataset("broken", clips)
    path = write_student(tmp_path / "a.safetensors", data.vocabulary)
    report = evaluate(data, path, max_failed=0.1)
    assert report.clips == 11
    assert [clip_id for clip_id, _ in report.failures] == ["broken"]
    sound = [clip for clip in clips if clip[0] != "broken"]
    expected = average_precision_by_hand(logits_by_hand(path, sound)[:, 0], labels_of(sound)[:, 0])
    assert report.systems[0].average_precision[0] == pytest.approx(expected)
    with pytest.raises(TooManyFailuresError, match="1 of 12 clips"):
        evaluate(data, path)


def test_clips_with_non_finite_logits_are_failures(data: Manifest, tmp_path: Path) -> None:
    path = write_student(tmp_path / "overflowing.safetensors", data.vocabulary, fill=1e30)
    with pytest.raises(TooManyFailuresError, match="12 non-finite logits"):
        evaluate(data, path, max_failed=1)


def test_a_checkpoint_for_other_classes_is_refused(data: Manifest, tmp_path: Path) -> None:
    classes = tuple(LabelClass(index, f"/m/{index}", f"Other {index}") for index in range(CLASSES))
    path = write_student(tmp_path / "other.safetensors", Vocabulary(classes))
    with pytest.raises(CheckpointError, match=r"other\.safetensors: was trained for 5 classes with hash"):
        evaluate(data, path)


def test_a_store_for_other_classes_is_refused(
    build_dataset: Callable[..., Manifest], data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", data, labels_of(clips) * 8.0)
    classes = tuple(LabelClass(index, f"/m/{index}", f"Other {index}") for index in range(CLASSES))
    other = build_dataset("other", clips, vocabulary=Vocabulary(classes))
    with pytest.raises(LogitStoreError, match="made for 5 classes with hash"):
        evaluate(other, store=store)


def test_a_released_file_needs_a_name_and_scores_like_ours(
    data: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = student.create_model("mn01", num_classes=CLASSES)
    ours, released = tmp_path / "ours.safetensors", tmp_path / "released.pt"
    metadata = {"stage": "student", "model": "mn01", "kwargs": {}, "classes": CLASSES}
    save_weights(ours, model.state_dict(), metadata | {"vocabulary_sha256": data.vocabulary.sha256})
    torch.save(model.state_dict(), released)
    with pytest.raises(UsageError, match=r"released\.pt: does not say which model it holds.*--model"):
        evaluate(data, str(released))
    with caplog.at_level(logging.WARNING):
        report = evaluate(data, str(released), str(ours), model="mn01")
    assert "does not say which classes it is for" in caplog.text
    np.testing.assert_array_equal(report.systems[0].roc_auc, report.systems[1].roc_auc)


@pytest.mark.parametrize(("package", "name"), [(student, "mn01"), (teacher, "passt_tiny")])
def test_a_released_file_with_another_number_of_classes_is_refused(
    data: Manifest, tmp_path: Path, package: object, name: str
) -> None:
    model = package.create_model(name, num_classes=CLASSES + 1)  # pyright: ignore[reportAttributeAccessIssue]
    torch.save(model.state_dict(), tmp_path / "released.pt")
    with pytest.raises(CheckpointError, match=r"released\.pt: is not for 5 classes"):
        evaluate(data, str(tmp_path / "released.pt"), model=name)


def test_several_plain_files_may_each_name_their_model(
    data: Manifest, clips: list[TinyClip], tmp_path: Path, five_classes: Vocabulary
) -> None:
    ours = write_student(tmp_path / "ours.safetensors", data.vocabulary)
    (tmp_path / "classes.csv").write_bytes(five_classes.to_csv_bytes())
    models = {name: student.create_model(name, num_classes=CLASSES, **COARSE) for name in ("mn01", "mn02")}
    for name, model in models.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    files = [f"{name}={tmp_path}/{name}.pt" for name in models]
    options = {"n-mels": "40", "hopsize": "1600"}
    report = evaluate(data, *files, ours, model_options=options, classes=str(tmp_path / "classes.csv"))
    assert [system.name for system in report.systems] == ["mn01", "mn02", "ours", "ensemble of 3"]
    logits = logits_by_hand(str(tmp_path / "mn01.pt"), clips)
    expected = average_precision_by_hand(logits[:, 0], labels_of(clips)[:, 0])
    assert report.system("mn01").average_precision[0] == pytest.approx(expected)


def test_an_unknown_model_is_wrong_usage(data: Manifest, tmp_path: Path) -> None:
    (tmp_path / "released.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="--model gramophone"):
        evaluate(data, str(tmp_path / "released.pt"), model="gramophone")


@pytest.mark.parametrize("name", ["best.safetensors", "released.pt"])
def test_a_damaged_checkpoint_is_named(data: Manifest, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match=name):
        evaluate(data, str(tmp_path / name), model="mn01")


def test_absent_files_are_named(data: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        evaluate(data, str(tmp_path / "none.safetensors"))
    with pytest.raises(LogitStoreError, match="not a logit store"):
        evaluate(data, store=str(tmp_path / "none"))
    with pytest.raises(ManifestError, match="nowhere"):
        run(EvaluateConfig(data=str(tmp_path / "nowhere"), store=str(tmp_path)))


@pytest.mark.parametrize(
    "settings", [{}, {"store": "s", "batch_size": 0}, {"store": "s", "workers": -1}, {"store": "s", "max_failed": 2}]
)
def test_settings_out_of_range_are_wrong_usage(settings: dict) -> None:
    with pytest.raises(UsageError):
        EvaluateConfig(data="data", **settings)


def test_runs_with_best_weights_are_called_by_their_folders_and_alike_ones_are_told_apart(
    data: Manifest, tmp_path: Path
) -> None:
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        write_student(tmp_path / folder / "best.safetensors", data.vocabulary)
    report = evaluate(data, *(str(tmp_path / folder / "best.safetensors") for folder in ("a/run", "b/run")))
    assert [system.name for system in report.systems] == ["run", "run (2)", "ensemble of 2"]


def test_out_receives_the_report_and_the_table_is_shown(
    data: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_student(tmp_path / "a.safetensors", data.vocabulary)
    report = evaluate(data, path, out=str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["systems"][0]["mAP"] == report.systems[0].mean_average_precision
    with (tmp_path / "out" / "per_class.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["positives"] for row in rows] == [str(count) for count in data.label_counts()]
    shown = capsys.readouterr().out
    assert f"{report.systems[0].mean_average_precision:.4f}" in shown
    assert "report.json" in shown


def test_a_dataset_without_a_decodable_clip_can_not_be_scored(
    build_dataset: Callable[..., Manifest], tmp_path: Path
) -> None:
    data = build_dataset("broken", [(f"clip {number}", (0,), b"no sound") for number in range(3)])
    with pytest.raises(TooManyFailuresError, match="3 of 3 clips"):
        evaluate(data, write_student(tmp_path / "a.safetensors", data.vocabulary), max_failed=1)


def test_an_empty_dataset_can_not_be_scored(build_dataset: Callable[..., Manifest], tmp_path: Path) -> None:
    empty = build_dataset("empty", [])
    with pytest.raises(ManifestError, match="holds no clips"):
        evaluate(empty, write_student(tmp_path / "a.safetensors", empty.vocabulary))
