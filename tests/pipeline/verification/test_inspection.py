from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stores import fill_store

from pipeline.dataset.manifest import Manifest, write_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import LogitStoreError, ManifestError, PipelineError
from pipeline.ingest.rejections import REJECTED_NAME, Rejection, tabulate, write_rejections
from pipeline.runtime.progress import MetricLog
from pipeline.training.checkpoints import save_checkpoint, save_weights
from pipeline.verification.inspection import cover, failures_by_reason, summarise_dataset, summarise_run

TinyClip = tuple[str, tuple[int, ...], bytes]


@pytest.fixture
def clips(make_noises: Callable[[int, int], list[TinyClip]]) -> list[TinyClip]:
    return make_noises(12, 5)


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], clips: list[TinyClip]) -> Manifest:
    return build_dataset("data", clips)


def no_logits(data: Manifest) -> np.ndarray:
    return np.zeros((len(data), len(data.vocabulary)))


def test_a_dataset_is_counted(data: Manifest, clips: list[TinyClip]) -> None:
    summary = summarise_dataset(data)
    assert (summary.clips, summary.shards, summary.formats) == (12, 3, {"wav": 12})
    assert summary.audio_bytes == sum(len(audio) for _, _, audio in clips)
    assert summary.shard_bytes == sum(path.stat().st_size for path in Path(data.location).glob("*.tar"))
    assert summary.label_counts.tolist() == [sum(index in labels for _, labels, _ in clips) for index in range(5)]
    assert summary.clips_without_labels == sum(not labels for _, labels, _ in clips)
    assert summary.vocabulary_sha256 == data.vocabulary.sha256
    assert (summary.missing_shards, summary.rejected, summary.clips_of_known_length) == ((), {}, 0)


def test_length_is_the_files_own_or_else_the_segments(data: Manifest) -> None:
    columns = {
        "sample_rate": pa.array([32_000, 16_000, 0, None] * 3, pa.int32()),
        "frames": pa.array([64_000, 16_000, 5, None] * 3, pa.int64()),
        "start_seconds": pa.array([0, None, 3, None] * 3, pa.float32()),
        "end_seconds": pa.array([10, None, 7, None] * 3, pa.float32()),
    }
    table = data.table
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    summary = summarise_dataset(write_manifest(data.location, table, data.vocabulary))
    assert summary.clips_of_known_length == 9
    assert summary.seconds == pytest.approx(3 * (2 + 1 + 4))
    assert summary.sample_rates_hz == {32_000: 3, 16_000: 3, 0: 3}


def test_rejected_files_are_counted_by_reason(data: Manifest) -> None:
    reasons = ["missing", "undecodable", "missing"]
    write_rejections(data.location, tabulate(Rejection("a", None, reason) for reason in reasons))
    assert list(summarise_dataset(data).rejected.items()) == [("missing", 2), ("undecodable", 1)]


def test_a_damaged_list_of_rejected_files_is_named(data: Manifest) -> None:
    path = Path(data.location) / REJECTED_NAME
    pq.write_table(pa.table({"why": ["no"]}), path)
    with pytest.raises(ManifestError, match=REJECTED_NAME):
        summarise_dataset(data)
    path.write_bytes(b"not Parquet")
    with pytest.raises(ManifestError, match=REJECTED_NAME):
        summarise_dataset(data)


def test_a_shard_that_is_not_there_is_missing(data: Manifest) -> None:
    (Path(data.location) / data.shards[1]).unlink()
    assert summarise_dataset(data).missing_shards == (data.shards[1],)


def test_coverage_names_the_shards_that_lack_logits(data: Manifest, tmp_path: Path) -> None:
    first, second, third = data.shards
    store = fill_store(
        tmp_path / "store", data, no_logits(data), shards=[first, third], failed={"-clip.01": "cut short"}
    )
    coverage = cover(store, data)
    assert (coverage.clips, coverage.covered_clips) == (12, 4 + 2)
    assert coverage.uncovered_shards == {first: 1, second: 5}
    assert coverage.changed_shards == ()
    assert failures_by_reason(store.parts) == {"cut short": 1}


def test_coverage_goes_by_clip_id_and_tells_which_shards_changed(
    build_dataset: Callable[..., Manifest], data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    store = fill_store(tmp_path / "store", data, no_logits(data))
    turned = build_dataset("turned", clips[::-1])
    coverage = cover(store, turned)
    assert coverage.covered_clips == 12
    assert coverage.uncovered_shards == {}
    assert coverage.changed_shards == tuple(turned.shards)


def test_coverage_of_other_classes_is_refused(
    build_dataset: Callable[..., Manifest], data: Manifest, clips: list[TinyClip], tmp_path: Path
) -> None:
    classes = tuple(LabelClass(index, f"/m/{index}", f"Other {index}") for index in range(5))
    other = build_dataset("other", clips, vocabulary=Vocabulary(classes))
    with pytest.raises(LogitStoreError, match="made for 5 classes"):
        cover(fill_store(tmp_path / "store", data, no_logits(data)), other)


def test_a_run_tells_its_best_score_its_last_figures_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "mn04"\n[distill]\nteacher_weight = 0.9\n')
    with MetricLog(tmp_path) as log:
        for epoch, score in enumerate([0.1, 0.4, 0.3]):
            log.write(epoch * 10 + 5, {"train/loss": 1 / (epoch + 1)}, epoch=epoch)
            log.write(epoch * 10 + 10, {"eval/mAP": score}, epoch=epoch)
    save_checkpoint(tmp_path, 30, {"step": 30}, keep=2)
    save_weights(tmp_path / "best.safetensors", {}, {"stage": "student"})
    summary = summarise_run(tmp_path)
    assert summary.settings == {"model": "mn04", "distill": {"teacher_weight": 0.9}}
    assert (summary.best_map, summary.best_epoch) == (0.4, 1)
    assert summary.last_metrics == {"step": 30, "epoch": 2, "train/loss": pytest.approx(1 / 3), "eval/mAP": 0.3}
    assert list(summary.files) == ["checkpoints/step-00000030.pt", "best.safetensors"]
    assert summary.files["best.safetensors"] == (tmp_path / "best.safetensors").stat().st_size


def test_a_run_that_just_began_has_nothing_yet(tmp_path: Path) -> None:
    summary = summarise_run(tmp_path)
    assert (summary.settings, summary.last_metrics, summary.best_map, summary.files) == ({}, {}, None, {})


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl"])
def test_damaged_settings_or_logs_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{ this is neither\n")
    with pytest.raises(PipelineError, match="is damaged"):
        summarise_run(tmp_path)
