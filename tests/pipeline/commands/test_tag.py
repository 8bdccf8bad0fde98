import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import student
from pipeline.commands.tag import TagConfig, run
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import TooManyFailuresError, UsageError
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
"""Keywords of a student that sees one frame in 50 ms: as real as any other, and quick."""
TinyClip = tuple[str, tuple[int, ...], bytes]
RATE_HZ = 32_000


@pytest.fixture
def checkpoint(tmp_path: Path, five_classes: Vocabulary) -> str:
    torch.manual_seed(3)
    model = student.create_model("mn01", num_classes=len(five_classes), **COARSE)
    metadata = {
        "stage": "student",
        "model": "mn01",
        "kwargs": COARSE,
        "classes": len(five_classes),
        "vocabulary_sha256": five_classes.sha256,
        "vocabulary": five_classes.to_csv_bytes().decode(),
    }
    save_weights(tmp_path / "mn01.safetensors", model.state_dict(), metadata)
    return str(tmp_path / "mn01.safetensors")


@pytest.fixture
def make_file(tmp_path: Path, make_noises: Callable[..., list[TinyClip]]) -> Callable[[str, float], str]:
    def make(name: str, seconds: float) -> str:
        (tmp_path / name).write_bytes(make_noises(1, 5, seconds=seconds)[0][2])
        return str(tmp_path / name)

    return make


def test_tags_are_the_models_own_classes_and_probabilities(
    checkpoint: str, make_file: Callable[[str, float], str], five_classes: Vocabulary
) -> None:
    file = make_file("short.wav", 1.5)
    (window,) = run(TagConfig((file,), checkpoint=checkpoint, top=3))
    model = student.create_model("mn01", checkpoint, num_classes=5, **COARSE).eval()
    waveform = torch.from_numpy(load_waveform(Path(file).read_bytes(), sample_rate_hz=RATE_HZ, seconds=10))
    with torch.inference_mode():
        expected = model(model.front_end(waveform[None]))[0].sigmoid().numpy()  # (classes,)
    best = np.argsort(-expected)[:3]
    assert [name for name, _ in window.tags] == [five_classes.names[index] for index in best]
    np.testing.assert_allclose([probability for _, probability in window.tags], expected[best], rtol=1e-5)
    assert (window.start_seconds, window.end_seconds) == (0, 1.5)


def test_long_file_is_heard_window_by_window(checkpoint: str, make_file: Callable[[str, float], str]) -> None:
    windows = run(TagConfig((make_file("long.wav", 23),), checkpoint=checkpoint))
    assert [(window.start_seconds, window.end_seconds) for window in windows] == [(0, 10), (10, 20), (20, 23)]


def test_json_is_one_object_a_window(
    checkpoint: str, make_file: Callable[[str, float], str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(TagConfig((make_file("a.wav", 1), make_file("b.wav", 11)), checkpoint=checkpoint, json=True, least=0.2))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.wav", "b.wav", "b.wav"]
    assert all(probability >= 0.2 for line in lines for probability in line["tags"].values())


def test_file_that_is_no_sound_is_named_after_the_others_are_tagged(
    checkpoint: str, make_file: Callable[[str, float], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.mp3").write_text("<html>")
    config = TagConfig((str(tmp_path / "page.mp3"), make_file("good.wav", 1)), checkpoint=checkpoint)
    with pytest.raises(TooManyFailuresError, match=r"1 of 2 files.*page\.mp3: not audio"):
        run(config)
    assert "good.wav" in capsys.readouterr().out.replace("\n", "")  # a long path is broken


def test_values_out_of_range_are_refused(checkpoint: str) -> None:
    with pytest.raises(UsageError, match="nothing to tag"):
        TagConfig((), checkpoint=checkpoint)
    with pytest.raises(UsageError, match="top is 0"):
        TagConfig(("a.wav",), checkpoint=checkpoint, top=0)
