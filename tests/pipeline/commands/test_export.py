import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import student
from pipeline.cli import run as run_cli
from pipeline.commands import export
from pipeline.commands.export import ExportConfig, run
from pipeline.errors import CheckpointError, PipelineError, UsageError

ROOT = Path(__file__).resolve().parents[3]
OUTSIDE = ["--front-end", "outside"]
COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}


def test_the_network_of_a_foreign_file_of_one_length_is_exported_by_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = student.create_model("mn01", se_dims="cft", head_type="multihead_attention_pooling", **COARSE).eval()
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    options = {"se-dims": "cft", "head-type": "multihead_attention_pooling", "n-mels": "40", "hopsize": "1600"}
    flags = [text for key, value in options.items() for text in (f"--model-options.{key}", value)]
    out = str(tmp_path / "new" / "mine.onnx")
    assert (
        run_cli(["export", f"mn01={tmp_path / 'mine.pt'}", *flags, "--out", out, "--output", "embeddings", *OUTSIDE])
        == 0
    )
    told = " ".join(capsys.readouterr().out.split())
    assert f"wrote {out}" in told
    assert "24 sounds of" in told  # of the sample
    with torch.inference_mode():
        images = network.front_end(0.1 * torch.randn(2, 320_000))
        expected = network.embed(images).numpy()
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape[1:] == [1, 40, images.shape[3]]
    (found,) = session.run(["embeddings"], {"log_mels": images.numpy()})
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.save(student.create_model("mn01", **COARSE).state_dict(), tmp_path / "other.pt")
    return f"mn01={tmp_path / 'other.pt'}"


def test_a_file_that_differs_from_its_checkpoint_is_not_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "mine.onnx"

    def biased(path: Path) -> Callable[[np.ndarray], np.ndarray]:
        network = student.create_model("mn01", checkpoint.partition("=")[2], **COARSE).eval()

        def run(given: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network(network.front_end(torch.from_numpy(given))).sigmoid().numpy() + 2e-3

        return run

    write = lambda exported, metadata, path: path.write_bytes(b"a model")  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "onnx", (write, biased, ""))
    with pytest.raises(PipelineError, match=r"differs from the checkpoint by 2\.0e-03, .* Nothing was written"):
        run(ExportConfig(checkpoint, out=str(out), model_options=COARSE))
    assert not list(out.parent.iterdir())


def test_a_file_that_does_not_run_is_not_kept(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "mine.onnx"
    write = lambda exported, metadata, path: path.write_bytes(b"no model")  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "onnx", (write, export.onnx_runner, ""))
    with pytest.raises(CheckpointError, match="the exported model: no whole ONNX file that ONNX Runtime can run"):
        run(ExportConfig(checkpoint, out=str(out), model_options=COARSE))
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_with_the_extra_to_install(
    package: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run_cli(["export", checkpoint, "--out", str(tmp_path / "mine.onnx")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"error: pipeline export needs {package}: pip install 'audioset-distill[export]'"]


def test_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"mine\.pb; let its name end in \.onnx or \.pt2"):
        ExportConfig("mn10", out="mine.pb")
    with pytest.raises(UsageError, match=r"mine\.onnx; let its name end in \.pt2"):
        ExportConfig("mn10", out="mine.onnx", format="pt2")


FULL_DISK = """
import resource, sys
from pipeline.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""


def test_a_full_disk_ends_in_one_line_whoever_writes_the_file(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "mine.pt2"
    flags = ("--out", str(out), "--model-options.n-mels", "40", "--model-options.hopsize", "1600")
    command = [sys.executable, "-c", FULL_DISK, "export", checkpoint, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {out}: there is no room left to write it")
    assert not list(out.parent.iterdir())


def test_a_file_of_torch_export_needs_no_package_of_the_extra_and_no_length(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "mine.pt2"
    run(ExportConfig(checkpoint, out=str(out), model_options=COARSE))
    _, example = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.M | re.S)
    made: dict[str, Any] = {}
    exec(example.replace("mn10.pt2", str(out)), made)
    module, names, said = made["module"], made["names"], json.loads(made["told"]["metadata.json"])
    assert (said["model"], len(names), names[0]) == ("mn01", 527, "Speech")
    network = student.create_model("mn01", checkpoint.partition("=")[2], **COARSE).eval()
    for batch, seconds in ((1, 0.7), (3, 12.0)):
        sounds = 0.1 * torch.randn(batch, round(32_000 * seconds))
        with torch.inference_mode():
            expected = network(network.front_end(sounds)).sigmoid()
            torch.testing.assert_close(module(sounds), expected, atol=1e-5, rtol=0)
