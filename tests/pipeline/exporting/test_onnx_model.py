import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pipeline.cli import run as run_cli
from pipeline.commands.tag import TagConfig, run
from pipeline.exporting.onnx_model import OnnxModel
from pipeline.models.loading import load_model
from pipeline.scoring.tagging import TorchTagger

TAG = """
import sys
from pipeline.cli import run
code = run(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def rewritten(path: Path, **properties: str | None) -> Path:
    """Change what a file says of itself; None removes it."""
    model = onnx.load(str(path))
    kept = {one.key: one.value for one in model.metadata_props} | properties
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in kept.items() if value is not None})
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("flags", [{}, {"window": 1.0}, {"window": 1.0, "hop": 0.25}])
def test_tags_are_those_of_the_checkpoint(
    tagger: Path, run_folder: Path, real_sounds: Path, flags: dict[str, float]
) -> None:
    found, expected = (
        run(TagConfig((str(real_sounds),), checkpoint=str(checkpoint), **flags))  # pyright: ignore[reportArgumentType]
        for checkpoint in (tagger, run_folder)
    )
    assert len(found) == len(expected) >= 3
    for one, other in zip(found, expected, strict=True):
        assert (one.file, one.start_seconds, one.end_seconds) == (other.file, other.start_seconds, other.end_seconds)
        assert dict(one.tags) == pytest.approx(dict(other.tags), abs=1e-4)


def test_probabilities_become_the_logits_that_they_are_of(tagger: Path, run_folder: Path) -> None:
    windows = 0.1 * torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)).numpy()
    expected = TorchTagger(load_model(str(run_folder))).logits(windows)
    np.testing.assert_allclose(OnnxModel(str(tagger)).logits(windows), expected, atol=1e-4)


def test_an_exported_file_and_a_checkpoint_are_an_ensemble(tagger: Path, run_folder: Path, real_sounds: Path) -> None:
    sound = str(real_sounds / "1.wav")
    (both,) = run(TagConfig((sound,), checkpoint=(str(tagger), str(run_folder))))
    (alone,) = run(TagConfig((sound,), checkpoint=str(run_folder)))
    assert dict(both.tags) == pytest.approx(dict(alone.tags), abs=1e-4)


def test_an_exported_file_tags_without_torch(tagger: Path, real_sounds: Path) -> None:
    sounds = [str(path) for path in sorted(real_sounds.iterdir())]
    command = [sys.executable, "-c", TAG, "tag", *sounds, "--checkpoint", str(tagger), "--workers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == sounds


def test_a_sound_that_is_shorter_than_the_front_end_takes_is_filled_up(tagger: Path, run_folder: Path) -> None:
    windows = np.full((1, 100), 0.1, np.float32)
    expected = TorchTagger(load_model(str(run_folder))).logits(windows)
    np.testing.assert_allclose(OnnxModel(str(tagger)).logits(windows), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("cut", "no whole ONNX file that ONNX Runtime can run"),
        ("empty", "no whole ONNX file that ONNX Runtime can run"),
        ("page", "no whole ONNX file that ONNX Runtime can run"),
        ("no classes", "does not say which classes it knows"),
        ("fewer classes", "gives (1, 5) for 1 sounds and 4 classes"),
        ("two ids", "names 5 classes and 2 ids"),
        ("no list", "its metadata is not what `pipeline export` writes (classes: "),
        ("embeddings", "gives embeddings, not tags of sounds"),
        ("outside", "takes log-mel images, not tags of sounds"),
        ("no runtime", "needs onnxruntime: pip install 'audioset-distill[export]'"),
        ("absent", "no such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    fault: str,
    told: str,
    tagger: Path,
    real_sounds: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    match fault:
        case "cut":
            tagger.write_bytes(tagger.read_bytes()[:-1000])
        case "empty":
            tagger.write_bytes(b"")
        case "page":
            tagger.write_bytes(b"<html>Sign in</html>")
        case "no classes":
            rewritten(tagger, classes=None)
        case "fewer classes":
            rewritten(tagger, classes=json.dumps(list("abcd")), class_ids=json.dumps(list("abcd")))
        case "two ids":
            rewritten(tagger, class_ids='["a", "b"]')
        case "no list":
            rewritten(tagger, classes="Speech, Music")
        case "embeddings":
            rewritten(tagger, output="embeddings")
        case "outside":
            rewritten(tagger, front_end="outside")
        case "no runtime":
            monkeypatch.setitem(sys.modules, "onnxruntime", None)
        case "absent":
            tagger.unlink()
    assert run_cli(["tag", str(real_sounds / "0.wav"), "--checkpoint", str(tagger)]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tagger}")
    assert told in lines[0]


def test_another_name_for_the_file_changes_nothing(tagger: Path, real_sounds: Path) -> None:
    shutil.move(tagger, tagger.with_name("Mine.ONNX"))
    (window,) = run(TagConfig((str(real_sounds / "0.wav"),), checkpoint=str(tagger.with_name("Mine.ONNX"))))
    assert len(window.tags) == 5
