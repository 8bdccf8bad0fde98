"""A plan's hours and bytes follow from measured speeds, and speeds are of the run that is meant."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_stores import fill_store, stamp_for

from pipeline import cli
from pipeline.commands.plan import PlanConfig, run
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.labelling.labelling_speed import LabellingSpeed, write_speed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> str:
    """24 clips in 3 shards."""
    return str(make_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture
def store(data: str, tmp_path: Path) -> str:
    """Made by two actors that took 10 s each for 24 clips."""
    manifest = read_manifest(data)
    fill_store(tmp_path / "store", manifest, np.zeros((24, 4), np.float16), stamp=stamp_for(manifest, "passt_tiny"))
    write_speed(str(tmp_path / "store"), LabellingSpeed(clips=24, busy_seconds=20.0, seconds=15.0))
    return str(tmp_path / "store")


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """Three epochs of two ranks, of which one was disturbed."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text('model = "mn04"\nbatch_size = 5\n')
    lines = [{"step": 4, "epoch": 0, "epoch/clips_per_second": rate, "epoch/ranks": 2.0} for rate in (8.0, 1.0, 9.0)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def test_hours_and_bytes_follow_from_what_was_measured(data: str, store: str, trained: str) -> None:
    config = PlanConfig(data=data, measured=(store, trained), gpus=3, epochs=10)
    labelling, epoch, training = run(config)
    assert labelling.gpu_hours == pytest.approx(24 / 1.2 / 3600)
    assert labelling.hours == pytest.approx(labelling.gpu_hours / 3)
    assert labelling.bytes_read == read_manifest(data).sizes.sum()
    assert labelling.bytes_stored == pytest.approx(sum(path.stat().st_size for path in Path(store).glob("*.parquet")))
    assert (epoch.clips, epoch.clips_per_second) == (20, 4.0)  # whole batches; the median epoch, of one rank
    assert training.gpu_hours == pytest.approx(10 * 20 / 4 / 3600)
    assert training.bytes_read == pytest.approx(10 * epoch.bytes_read)


def test_what_is_not_given_is_measured_on_the_clips_themselves(data: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = PlanConfig(data=data, teacher=("passt_tiny",), model="mn01", batch_size=6, seconds=0.01, device="cpu")
    labelling, epoch, _ = run(config)
    assert labelling.clips_per_second > 0
    assert epoch.clips_per_second > 0
    assert [record.message.split(" on ")[0] for record in caplog.records if "measuring" in record.message] == [
        "measuring the teachers",
        "measuring mn01 in training",
    ]


def test_a_price_and_a_missing_teacher_are_told(data: str, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--data", data, "--measured", trained, "--price", "3600", "--epochs", "1"]) == 0
    told = capsys.readouterr().out
    assert "5.00" in told  # 20 clips at 4 clips/s
    assert "stage 1 is left out: give --teacher" in told


def test_speeds_of_other_models_are_refused(data: str, store: str, trained: str, tmp_path: Path) -> None:
    config = PlanConfig(data=data, measured=(store, trained))
    with pytest.raises(UsageError, match="was made by passt_tiny, not by ast_tiny"):
        run(replace(config, teacher=("ast_tiny",)))
    with pytest.raises(UsageError, match="trained mn04, not mn10"):
        run(replace(config, model="mn10"))
    with pytest.raises(UsageError, match="is the second of its kind"):
        run(replace(config, measured=(store, store)))
    with pytest.raises(UsageError, match="is a dataset"):
        run(replace(config, measured=(data,)))
    (Path(store) / "speed.json").unlink()
    with pytest.raises(UsageError, match="does not say how fast it was made"):
        run(config)
    (Path(trained) / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no epoch of it is finished"):
        run(replace(config, measured=(trained,)))


@pytest.mark.parametrize("settings", [{"gpus": 0}, {"epochs": 0}, {"seconds": 0}, {"teacher": ("@2",)}])
def test_settings_out_of_range_are_refused_before_anything_is_read(settings: dict) -> None:
    with pytest.raises(UsageError):
        PlanConfig(data="nowhere", **settings)
