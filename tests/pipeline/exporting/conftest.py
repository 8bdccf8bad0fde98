"""Exported files that several tests look at; an export takes seconds, so each is made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import student
from pipeline.commands.export import ExportConfig, run
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
CLASSES = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f'Sound "{index}", höher') for index in range(5)))


def tones(seconds: float = 1.0, count: int = 24) -> np.ndarray:
    """Returns tones in noise of many pitches and loudnesses, (count, samples), float32, at 32 kHz."""
    random, time = np.random.default_rng(3), np.arange(round(seconds * 32_000)) / 32_000
    pitches_hz, loud = np.geomspace(60, 12_000, count)[:, None], random.uniform(0.02, 0.4, (count, 1))
    noise = random.standard_normal((count, len(time))) * random.uniform(0.001, 0.2, (count, 1))
    return (loud * np.sin(2 * np.pi * pitches_hz * time) + noise).astype(np.float32)


def write_student(path: Path, name: str = "mn01", *, seed: int = 0, **kwargs: Any) -> Path:
    """Write a student as training leaves it, with batch norms that know what sounds are like."""
    torch.manual_seed(seed)
    keywords = COARSE | kwargs
    network = student.create_model(name, num_classes=len(CLASSES), **keywords)
    with torch.no_grad():
        sounds = network.front_end.eval()(torch.from_numpy(tones(5.0)))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(sounds)
        network.get_classifier().get_parameter("bias").uniform_(-3, 3)
    metadata = {
        "stage": "student",
        "model": name,
        "kwargs": keywords,
        "classes": len(CLASSES),
        "vocabulary_sha256": CLASSES.sha256,
        "vocabulary": CLASSES.to_csv_bytes().decode(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, network.state_dict(), metadata)
    return path


@pytest.fixture(scope="session")
def real_sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sounds of several lengths."""
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(5)
    for number, seconds in enumerate((0.2, 1.5, 4.0)):
        samples = 0.2 * random.standard_normal(round(seconds * 32_000)) * np.hanning(round(seconds * 32_000))
        soundfile.write(folder / f"{number}.wav", samples, 32_000)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run left behind."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    write_student(folder / "last.safetensors", seed=1)
    return write_student(folder / "best.safetensors").parent


@pytest.fixture(scope="session")
def _tagger(run_folder: Path, real_sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "mine.onnx"
    run(ExportConfig(str(run_folder), out=str(out), check_data=str(real_sounds), licence="CC BY 4.0"))
    return out


@pytest.fixture
def tagger(_tagger: Path, tmp_path: Path) -> Path:
    """A file that gives probabilities, of `run_folder`."""
    return Path(shutil.copy(_tagger, tmp_path / "mine.onnx"))


StudentWriter = Callable[..., Path]


@pytest.fixture
def make_student() -> StudentWriter:
    return write_student


@pytest.fixture
def make_tones() -> Callable[..., np.ndarray]:
    return tones
