"""What `pipeline publish` writes is what timm, this project and a reader of cards can use."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from made_stores import fill_store, stamp_for

import student
from pipeline import cli
from pipeline.dataset.manifest import Manifest
from pipeline.exporting.onnx_model import OnnxModel
from pipeline.models.loading import load_model
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
CLASSES = 5


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("learned from", make_noises(12, CLASSES))


@pytest.fixture
def run(data: Manifest, tmp_path: Path) -> str:
    folder = tmp_path / "run"
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=CLASSES, **COARSE)
    metadata = {"stage": "student", "model": "mn01", "kwargs": COARSE, "classes": CLASSES}
    metadata |= {"vocabulary_sha256": data.vocabulary.sha256, "vocabulary": data.vocabulary.to_csv_bytes().decode()}
    save_weights(folder / "best.safetensors", model.state_dict(), metadata)
    store = tmp_path / "logits"
    fill_store(store, data, np.zeros((12, CLASSES)), stamp=stamp_for(data, "passt_s", "my own | teacher"))
    settings = f'data = "{data.location}"\nstore = "{store}"\nrun = "{folder}"\nepochs = 3\nmodel = "mn01"\n'
    (folder / "config.toml").write_text(f"{settings}[distill]\ntemperature = 1.0\n")
    return str(folder)


def published(source: str, folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Returns the card's front matter and its text. ONNX takes seconds: it is written where the flags say so."""
    onnx = [] if "--onnx" in flags else ["--no-onnx"]
    assert cli.run(["publish", source, "--to", str(folder), *flags, *onnx]) == 0
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def waveforms(seconds: float = 1.0) -> torch.Tensor:
    return torch.randn(2, round(32_000 * seconds), generator=torch.Generator().manual_seed(1)) * 0.1


def test_timm_builds_and_fills_the_model_from_its_folder(run: str, data: Manifest, tmp_path: Path) -> None:
    published(run, tmp_path / "out")
    built: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    own = student.create_model("mn01", f"{run}/best.safetensors", num_classes=CLASSES, **COARSE).eval()
    with torch.inference_mode():
        torch.testing.assert_close(built(built.front_end(waveforms())), own(own.front_end(waveforms())), rtol=0, atol=0)
    assert built.pretrained_cfg["label_names"] == [label.mid for label in data.vocabulary.classes]
    assert list(built.pretrained_cfg["label_descriptions"].values()) == list(data.vocabulary.names)
    assert built.num_classes == CLASSES


def test_the_onnx_file_goes_along_and_the_cards_lines_run_it_without_torch(run: str, tmp_path: Path) -> None:
    _, text = published(run, tmp_path / "out", "--onnx", "--licence", "CC-BY-4.0")
    assert "| `model.onnx` |" in text
    about = OnnxModel(str(tmp_path / "out" / "model.onnx")).metadata
    assert (about.source, about.licence) == ("run", "CC-BY-4.0"), "no path of this machine"
    program = text.split("Without this project or torch:\n\n```python\n")[1].partition("```")[0]
    program += "import sys\nassert 'torch' not in sys.modules\nprint(json.dumps([names, probabilities.tolist()]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, check=True)
    names, ((*found,),) = json.loads(done.stdout)
    model = load_model(run)
    assert names == list(model.vocabulary.names)
    network: Any = model.network
    with torch.inference_mode():
        own = network(network.front_end(torch.zeros(1, 320_000))).sigmoid()[0]
    assert found == pytest.approx(own.tolist(), abs=1e-5)


def test_a_missing_exporter_names_its_extra_and_what_goes_without_it(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.run(["publish", run, "--to", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "publish without --no-onnx needs onnxscript: pip install 'audioset-distill[export]'" in told
    assert not (tmp_path / "out").exists()
    published(run, tmp_path / "out")
    assert "onnx" not in (tmp_path / "out" / "README.md").read_text()


def test_this_project_takes_the_folder_for_a_checkpoint(run: str, data: Manifest, tmp_path: Path) -> None:
    published(run, tmp_path / "out")
    model = load_model(str(tmp_path / "out"))
    assert model.sha256 == load_model(f"{run}/best.safetensors").sha256
    assert model.vocabulary.sha256 == data.vocabulary.sha256


def test_the_card_says_what_the_run_and_its_evaluation_say(run: str, data: Manifest, tmp_path: Path) -> None:
    evaluation = str(tmp_path / "evaluation")
    flags = ["--checkpoint", f"{run}/best.safetensors", "--data", data.location, "--workers", "0"]
    assert cli.run(["evaluate", *flags, "--out", evaluation]) == 0
    front, text = published(run, tmp_path / "my-tagger", "--evaluation", evaluation, "--licence", "CC-BY-4.0")
    report = json.loads(Path(evaluation, "report.json").read_text())
    assert front["license"] == "cc-by-4.0"
    assert front["pipeline_tag"] == "audio-classification"
    (index,) = front["model-index"]
    assert index["name"] == "my-tagger"
    metrics = {one["type"]: one["value"] for result in index["results"] for one in result["metrics"]}
    assert metrics["mAP"] == pytest.approx(report["systems"][0]["mAP"], abs=1e-6)
    assert f"| mAP | {report['systems'][0]['mAP']:.4f} |" in text
    assert report["clip_ids_sha256"] in text
    assert "12 clips of learned from" in text
    assert "| `passt_s` | 1 | Apache-2.0 | https://arxiv.org/abs/2110.05069 |" in text
    assert "`my own \\| teacher`" in text, "a table's bar"
    assert "M parameters, 0.0" in text, "multiply-accumulates"
    assert "distill.temperature = 1.0" in text
    assert str(tmp_path) not in text.replace(str(tmp_path / "out"), ""), "no path of this machine"


def test_an_evaluation_of_other_weights_is_refused(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"data": "x", "clips": 1, "clip_ids_sha256": "0", "classes_scored": 1}
    (tmp_path / "report.json").write_text(json.dumps(report | {"systems": [{"name": "other", "sha256": "1" * 64}]}))
    assert cli.run(["publish", run, "--to", str(tmp_path / "out"), "--evaluation", str(tmp_path / "report.json")]) == 1
    assert "none of which has these weights" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]")
    assert cli.run(["publish", run, "--to", str(tmp_path / "out"), "--evaluation", str(tmp_path)]) == 2
    assert "is no report.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_can_no_longer_be_read_is_told_and_left_out(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(run, "config.toml").write_text('data = "/nowhere/train"\nstore = "/nowhere/logits"\nepochs = 3\n')
    _, text = published(run, tmp_path / "out")
    warnings = capsys.readouterr().err
    assert "name it with --data" in warnings
    assert "name their store with --store" in warnings
    assert "/nowhere" not in text
    assert "data = train" in text


def test_a_foreign_file_becomes_one_that_says_what_it_is(tmp_path: Path, data: Manifest) -> None:
    torch.manual_seed(0)
    foreign = tmp_path / "foreign.pt"
    torch.save(student.create_model("mn01", num_classes=CLASSES, **COARSE).state_dict(), foreign)
    (tmp_path / "own.csv").write_bytes(data.vocabulary.to_csv_bytes())
    flags = ["--model", "mn01", "--model-options.n_mels", "40", "--model-options.hopsize", "1600"]
    published(str(foreign), tmp_path / "out", *flags, "--classes", str(tmp_path / "own.csv"))
    model = load_model(str(tmp_path / "out"))
    assert model.vocabulary.names == data.vocabulary.names
    assert model.options == COARSE
    built = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for key, tensor in torch.load(foreign, weights_only=True).items():
        assert torch.equal(built.state_dict()[key], tensor)


def test_a_checkpoint_without_classes_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = student.create_model("mn01", num_classes=CLASSES, **COARSE)
    metadata = {
        "stage": "student",
        "model": "mn01",
        "kwargs": COARSE,
        "classes": CLASSES,
        "vocabulary_sha256": "0" * 64,
    }
    save_weights(tmp_path / "w.safetensors", model.state_dict(), metadata)
    assert cli.run(["publish", str(tmp_path / "w.safetensors"), "--to", str(tmp_path / "out")]) == 1
    assert "Give the checkpoint's class list" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    assert cli.run(["publish", run, "--to", str(tmp_path / "out")]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_the_example_runs_as_it_stands(run: str, data: Manifest, tmp_path: Path, make_noises: Callable) -> None:
    published(run, tmp_path / "out")
    (tmp_path / "sound.wav").write_bytes(make_noises(1, CLASSES, seconds=1)[0][2])
    command = [sys.executable, str(tmp_path / "out" / "example.py"), str(tmp_path / "sound.wav")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(data.vocabulary.names)
    assert all(0 <= float(line.split()[0]) <= 1 for line in lines)
