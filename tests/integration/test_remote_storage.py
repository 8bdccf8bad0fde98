"""Both stages on a real S3 server and a real web server, through a proxy that fails now and then."""

import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_stores import stamp_for
from object_servers import SECRET_KEY, Fault, Proxy, S3Server, web_server
from safetensors.torch import load, load_file

import student
import teacher
from pipeline.commands import compare, evaluate, inspect_path
from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.dataset.manifest import SCHEMA, read_manifest, write_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.errors import StorageError, StorageUnavailableError
from pipeline.logits.store import open_store, publish_part, write_stamp
from pipeline.storage import files as storage
from pipeline.training.checkpoints import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

PASSWORD = "open-sesame-0123456789"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.remote.stores._FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr("pipeline.storage.remote.stores._stores", {})


def settings(data: str, store: str | None, run_folder: str, cache: Path, **others: object) -> TrainStudentConfig:
    config = TrainStudentConfig(
        data=data,
        store=store,
        run=run_folder,
        cache=str(cache),
        model="mn01",
        epochs=1,
        batch_size=4,
        workers=0,
        device="cpu",
    )
    return replace(config, **others)  # pyright: ignore[reportArgumentType]


def same_weights(found: bytes, expected: Path) -> bool:
    one, other = load(found), load_file(expected)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def make_data(make_dataset: Callable[..., Path], location: str) -> None:
    """Write a dataset whose manifest knows the checksums, as `ingest` and `index` leave it."""
    make_dataset(location, clips=8)
    manifest, reader = read_manifest(location), storage.RangeReader(location)
    sums = [zlib.crc32(read_clip_bytes(reader, manifest, row)) for row in range(len(manifest))]
    plain = manifest.table.cast(SCHEMA)
    column = plain.schema.get_field_index("crc32")
    write_manifest(
        location, plain.set_column(column, SCHEMA.field("crc32"), [pa.array(sums, pa.uint32())]), manifest.vocabulary
    )


def make_store(data: str, store: str) -> None:
    manifest = read_manifest(data)
    stamp = stamp_for(manifest)
    write_stamp(store, stamp)
    logits = 16 * manifest.label_matrix(np.arange(8)) - 8
    publish_part(store, "train-000000", manifest.clip_ids[:8].to_pylist(), logits, stamp, "")
    storage.write_listing(store)


def make_teacher(location: str, vocabulary_sha256: str, folder: Path) -> None:
    network = teacher.create_model("passt_tiny", num_classes=4)
    metadata = {"stage": "teacher", "model": "passt_tiny", "kwargs": {}, "classes": 4}
    save_weights(folder / "t.safetensors", network.state_dict(), {**metadata, "vocabulary_sha256": vocabulary_sha256})
    storage.publish_bytes(location, (folder / "t.safetensors").read_bytes())


@pytest.mark.ray
def test_stage_1_writes_to_s3_and_stage_2_trains_from_it(
    make_dataset: Callable[..., Path], s3_proxy: Proxy, s3_folder: str, tmp_path: Path
) -> None:
    data, store, weights = f"{s3_folder}/data", f"{s3_folder}/store", f"{s3_folder}/t.safetensors"
    make_data(make_dataset, data)
    make_teacher(weights, read_manifest(data).vocabulary.sha256, tmp_path)
    s3_proxy.faults = [
        Fault("status", 503, 3, "GET", r"\.tar"),
        Fault("cut-answer", 1000, 3, "GET", r"\.tar"),
        Fault("cut-upload", 500, 2, "PUT", r"\.parquet"),
    ]

    def pipeline(*words: str) -> str:
        command = [sys.executable, "-m", "pipeline", "--verbose", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = pipeline(
        *("teacher-logits", "--data", data, "--store", store, "--teacher", f"passt_tiny={weights}"),
        *("--actors", "1", "--cpus-per-actor", "1"),
    )
    assert [fault.times for fault in s3_proxy.faults] == [0, 0, 0]
    assert open_store(store).clip_count == 8
    assert {file.name for file in storage.list_files(store)} >= {"store.json", "failed.parquet", "files.json"}
    s3_proxy.faults = [Fault("status", 503, 2, "GET", r"\.tar"), Fault("cut-answer", 1000, 2, "GET", r"\.tar")]
    said += pipeline(
        *("train-student", "--data", data, "--store", store, "--eval-data", data, "--run", f"{s3_folder}/run"),
        *("--model", "mn01", "--epochs", "1", "--batch-size", "4", "--workers", "2", "--device", "cpu"),
        *("--cache-dir", str(tmp_path / "cache"), "--cache-size", "0.1"),
    )
    assert [fault.times for fault in s3_proxy.faults] == [0, 0]
    assert SECRET_KEY not in said
    names = set(storage.list_tree(f"{s3_folder}/run"))
    assert names >= {"config.toml", "metrics.jsonl", "last.safetensors", "checkpoints/step-00000002.pt"}
    assert any(name.startswith("tensorboard/") for name in names)
    assert list((tmp_path / "cache").glob("shard-*.tar"))


def test_a_run_on_s3_is_the_run_on_disk_and_resumes_and_is_read_from_there(
    make_dataset: Callable[..., Path],
    s3: S3Server,
    s3_proxy: Proxy,
    s3_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, store, remote = f"{s3_folder}/data", f"{s3_folder}/store", f"{s3_folder}/run"
    make_data(make_dataset, data)
    make_store(data, store)
    on_disk = s3.folder / s3_folder.removeprefix("s3://")
    run(settings(str(on_disk / "data"), str(on_disk / "store"), str(tmp_path / "run"), tmp_path / "local", epochs=2))
    config = settings(data, store, remote, tmp_path / "cache", workers=2)
    run(config)
    s3_proxy.requests.clear()
    run(replace(config, epochs=2, resume=True))
    assert not [path for method, path in s3_proxy.requests if method == "GET" and ".tar" in path], "all in the cache"
    assert same_weights(storage.read_bytes(f"{remote}/last.safetensors"), tmp_path / "run/last.safetensors")
    steps = [line["step"] for line in map(json.loads, storage.read_bytes(f"{remote}/metrics.jsonl").splitlines())]
    assert steps == [2, 4]
    with pytest.raises(Exception, match="is not empty"):
        run(config)
    for form in (
        lambda: evaluate.run(
            evaluate.EvaluateConfig(data=data, store=store, checkpoint=(f"{remote}/last.safetensors",))
        ),
        lambda: compare.run(compare.CompareConfig(run=(remote,), data=data, out=f"{s3_folder}/report", workers=0)),
        lambda: inspect_path.run(inspect_path.InspectConfig(remote)),
        lambda: inspect_path.run(inspect_path.InspectConfig(store, data=data)),
    ):
        form()
    assert "checkpoints/step-00000004.pt" in capsys.readouterr().out
    assert storage.exists(f"{s3_folder}/report/comparison.png")


def test_a_server_that_goes_away_ends_a_run_with_its_state_saved(
    make_dataset: Callable[..., Path], s3_proxy: Proxy, s3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.remote.stores._TRIES", 2)
    data = f"{s3_folder}/data"
    make_data(make_dataset, data)
    config = settings(data, None, str(tmp_path / "run"), tmp_path / "cache", workers=1)
    run(config)
    config = replace(config, epochs=2, resume=True, cache=str(tmp_path / "empty"))
    s3_proxy.faults = [Fault("status", 503, 10_000, "GET", r"\.tar")]
    with pytest.raises(StorageUnavailableError, match="answers 503") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    s3_proxy.faults = []
    assert run(config).steps == 4


def test_a_dataset_and_a_store_behind_a_web_server_are_trained_from_and_its_password_stays_secret(
    make_dataset: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = tmp_path / "served"
    make_data(make_dataset, str(served / "data"))
    make_store(str(served / "data"), str(served / "store"))
    shutil.copytree(served / "store", served / "unlisted", ignore=shutil.ignore_patterns("files.json"))
    network = student.create_model("mn01", num_classes=4)
    made = {"stage": "student", "model": "mn01", "kwargs": {}, "classes": 4}
    save_weights(
        served / "s.safetensors",
        network.state_dict(),
        {**made, "vocabulary_sha256": read_manifest(served / "data").vocabulary.sha256},
    )
    run(settings(str(served / "data"), str(served / "store"), str(tmp_path / "a"), tmp_path / "cache-a"))
    with web_server(served, "anna", PASSWORD) as plain:
        url = plain.replace("://", f"://anna:{PASSWORD}@")
        config = settings(f"{url}/data", f"{url}/store", str(tmp_path / "b"), tmp_path / "cache-b", workers=2)
        run(replace(config, eval_data=f"{url}/data?X-Amz-Signature={PASSWORD}", checkpoint=None))
        assert same_weights((tmp_path / "b/last.safetensors").read_bytes(), tmp_path / "a/last.safetensors")
        weights = f"{url}/s.safetensors?X-Amz-Signature={PASSWORD}"
        run(replace(config, checkpoint=weights, run=str(tmp_path / "c")))
        evaluate.run(
            evaluate.EvaluateConfig(
                data=f"{url}/data", store=f"{url}/store", checkpoint=(weights,), out=str(tmp_path / "report"), workers=0
            )
        )
        inspect_path.run(inspect_path.InspectConfig(f"{url}/data"))
        inspect_path.run(inspect_path.InspectConfig(f"{url}/store", data=f"{url}/data"))
        with pytest.raises(StorageError, match="can only be read"):
            run(replace(config, run=f"{url}/run"))
        errors = []
        for open_it, location in ((open_store, f"{url}/unlisted"), (read_manifest, f"{plain}/data")):
            with pytest.raises(StorageError) as caught:
                open_it(location)
            errors.append(str(caught.value))
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "--verbose",
            "evaluate",
            "--data",
            f"{url}/none",
            "--checkpoint",
            weights,
        ]
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert failed.returncode == 1
        assert "has no manifest.parquet" in failed.stderr
    assert "files.json" in errors[0]
    assert "permission denied (401)" in errors[1]
    shown = "".join((*capfd.readouterr(), *errors, failed.stdout, failed.stderr))
    assert PASSWORD not in shown
    for path in tmp_path.rglob("*"):
        if path.is_file() and served not in path.parents:
            assert PASSWORD.encode() not in path.read_bytes(), path
