"""Shards that somebody made with `tar`, under names of their own: indexed, trained on, compared and tagged."""

import io
import json
import subprocess
import wave
from pathlib import Path

import numpy as np
import pytest
from made_stores import fill_store, stamp_for
from safetensors.torch import load_file

from pipeline import cli
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary

CLASSES = Vocabulary(tuple(LabelClass(index, f"/own/{index}", f"Sound {index}") for index in range(4)))


def write_tone(path: Path, hertz: float) -> None:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes((8000 * np.sin(np.arange(8000) / 16_000 * 6.283 * hertz)).astype("<i2").tobytes())
    path.write_bytes(stream.getvalue())


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Two tars by the system's own `tar`: keys that are no ids, folders, other metadata, other members."""
    files = tmp_path / "files" / "some folder"
    files.mkdir(parents=True)
    for number in range(12):
        stem = files / f"Sample no. {number:03}"
        write_tone(stem.with_name(f"{stem.name}.wav"), 200 + 100 * number)
        description = {"id": f"clip/{number}", "label_id": [number % 3], "label": [f"Sound {number % 3}"]}
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(description))
        stem.with_name(f"{stem.name}.txt").write_text("a caption")
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "own.csv").write_bytes(CLASSES.to_csv_bytes())
    names = sorted(path.relative_to(tmp_path / "files").as_posix() for path in files.iterdir())
    for shard, members in (("b.tar", names[:18]), ("a.tar", names[18:])):
        subprocess.run(["tar", "-cf", data / shard, *members], cwd=tmp_path / "files", check=True)
    return str(data)


def test_tars_under_foreign_names_train_after_an_index(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["index", dataset, "--classes", str(tmp_path / "own.csv")]) == 0
    manifest = read_manifest(dataset)
    assert sorted(manifest.clip_ids.to_pylist()) == sorted(f"clip/{number}" for number in range(12))

    store = str(tmp_path / "store")
    logits = 8 * manifest.label_matrix(np.arange(len(manifest))) - 4  # (clips, classes)
    fill_store(store, manifest, logits, stamp=stamp_for(manifest, "ideal"))

    run = str(tmp_path / "run")
    settings = ["--model", "mn01", "--model-options.n_mels", "40", "--model-options.hopsize", "1600"]
    settings += ["--epochs", "2", "--batch-size", "6", "--workers", "0", "--cache", str(tmp_path / "cache")]
    command = ["train-student", "--data", dataset, "--store", store, "--eval-data", dataset, "--run", run, *settings]
    assert cli.run(command) == 0
    assert load_file(f"{run}/best.safetensors")

    out = tmp_path / "report"
    compare = ["compare", "--run", run, run, "--store", store, "--data", dataset, "--out", str(out), "--workers", "0"]
    assert cli.run(compare) == 0
    systems = {system["name"]: system for system in json.loads((out / "report.json").read_text())["systems"]}
    assert systems["ideal"]["mAP"] == 1.0
    assert 0 < systems["run"]["mAP"] <= 1
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "ideal" in shown
    assert "run above run (2): mAP +0.0000, 95 % interval +0.0000 to +0.0000: within chance" in shown

    sound = str(tmp_path / "files" / "some folder" / "Sample no. 000.wav")
    assert cli.run(["tag", sound, "--checkpoint", f"{run}/best.safetensors", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["tags"]) <= set(CLASSES.names)


def test_a_folder_that_holds_no_run_is_told(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["index", dataset, "--classes", str(tmp_path / "own.csv")]) == 0
    assert cli.run(["compare", "--run", str(tmp_path), "--data", dataset, "--out", str(tmp_path / "out")]) == 2
    assert "holds no weights" in capsys.readouterr().err
