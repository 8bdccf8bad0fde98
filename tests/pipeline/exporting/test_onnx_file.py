import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch

from pipeline.dataset.audio import decode
from pipeline.models.loading import load_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.3, 10.0, 30.0])
def test_one_file_takes_any_length_and_any_batch(tagger: Path, run_folder: Path, seconds: float, batch: int) -> None:
    model = load_model(str(run_folder))
    sounds = 0.1 * torch.randn(batch, round(32_000 * seconds), generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        expected = model.network(model.network.get_submodule("front_end")(sounds)).sigmoid().numpy()
    session = onnxruntime.InferenceSession(str(tagger))
    (found,) = session.run(["probabilities"], {"waveforms": sounds.numpy()})
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def test_a_file_says_what_it_is(tagger: Path, run_folder: Path) -> None:
    said = onnxruntime.InferenceSession(str(tagger)).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == [f'Sound "{index}", höher' for index in range(5)]
    assert json.loads(said["class_ids"]) == [f"/m/{index}" for index in range(5)]
    assert {key: said[key] for key in ("model", "task", "output", "front_end", "licence")} == {
        "model": "mn01",
        "task": "multi-label",
        "output": "probabilities",
        "front_end": "inside",
        "licence": "CC BY 4.0",
    }
    assert (int(said["sample_rate_hz"]), float(said["input_seconds"])) == (32_000, 10.0)
    assert said["source_sha256"] == hashlib.sha256((run_folder / "best.safetensors").read_bytes()).hexdigest()
    assert said["source"] == str(run_folder)
    assert f"torch {torch.__version__}, opset 18" in said["exporter"]


def test_a_file_holds_everything_and_needs_no_batch_norm_and_no_fourier_transform(tagger: Path) -> None:
    assert [path.name for path in tagger.parent.iterdir()] == ["mine.onnx"]
    model = onnx.load(str(tagger))
    assert [(one.domain, one.version) for one in model.opset_import if one.domain == ""] == [("", 18)]
    used = {node.op_type for node in model.graph.node}
    assert used.isdisjoint({"BatchNormalization", "STFT", "DFT"})
    assert {node.domain for node in model.graph.node} == {""}


def test_the_example_in_the_docs_runs_where_there_is_no_torch(tagger: Path, tmp_path: Path) -> None:
    example, *_ = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.M | re.S)
    assert len(example.splitlines()) <= 12
    samples = 0.1 * np.random.default_rng(0).standard_normal((40_000, 2))
    soundfile.write(tmp_path / "street.wav", samples, 32_000)
    without = "import sys\nfor name in ('torch', 'pipeline', 'student'): sys.modules[name] = None\n"
    command = [sys.executable, "-c", without + example, str(tagger), str(tmp_path / "street.wav")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    heard = decode((tmp_path / "street.wav").read_bytes()).samples[None]
    (probabilities,) = onnxruntime.InferenceSession(str(tagger)).run(None, {"waveforms": heard})
    best = np.sort(np.asarray(probabilities)[0])[::-1]
    assert [float(line.split()[0]) for line in done.stdout.splitlines()] == pytest.approx(best.tolist(), abs=1e-3)
    assert all("höher" in line for line in done.stdout.splitlines())
