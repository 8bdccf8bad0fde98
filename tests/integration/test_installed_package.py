"""The package as users get it: built, installed beside what it declares to need, and used outside the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator, Sequence
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import soundfile
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import teacher
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.training.checkpoints import save_weights

ROOT = Path(__file__).resolve().parents[2]
CLASSES = Vocabulary((LabelClass(0, "high", "high"), LabelClass(1, "low", "low")))

INSTALLED = """
import importlib.metadata, sys
import pipeline
assert "site-packages" in pipeline.__path__[0], pipeline.__path__
print(*sorted({found.metadata["Name"] for found in importlib.metadata.distributions()}), sep="\\n")
"""


def build(folder: Path, target: str, into: Path) -> Path:
    into.mkdir()
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(into)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an unpacked sdist, as pip builds one."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(build(ROOT, "sdist", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build(unpacked, "wheel", folder / "wheel")


def needed_by(requirements: Sequence[str], extra: str, known: set[tuple[str, str]]) -> None:
    """Add the distributions that requirements name, and those that these need, as (name, extra)."""
    for needed in map(Requirement, requirements):
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        for its_extra in ("", *needed.extras):
            if (name, its_extra) not in known:
                known.add((name, its_extra))
                needed_by(distribution(name).requires or (), its_extra, known)


def top_names(name: str) -> Iterator[Path]:
    """Yield what a distribution has put directly into the packages' folder."""
    found = distribution(name)
    tops = {Path(file.parts[0]) for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
    yield from (Path(str(found.locate_file(top))) for top in tops)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and links to what it declares that it needs; nothing of the development tools."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    needed: set[tuple[str, str]] = set()
    metadata = next(name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    needed_by(message_from_bytes(ZipFile(wheel).read(metadata)).get_all("Requires-Dist") or (), "", needed)
    for name in {name for name, _ in needed}:
        for path in top_names(name):
            if not (packages / path.name).exists():  # several share a folder such as nvidia
                (packages / path.name).symlink_to(path)
    install = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(folder / "bin/python")]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True)
    return folder


def run(environment: Path, folder: Path, *command: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_a_wheel_of_the_sdist_is_the_wheel_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    names = [ZipFile(path).namelist() for path in (wheel, build(ROOT, "wheel", tmp_path / "wheel"))]
    assert sorted(names[0]) == sorted(names[1])


@pytest.mark.ray
def test_the_main_job_runs_from_an_installed_wheel_without_the_development_tools(
    environment: Path, tmp_path: Path
) -> None:
    there = {canonicalize_name(name) for name in run(environment, tmp_path, "python", "-c", INSTALLED).split()}
    assert "audioset-distill" in there
    assert not there & {"pytest", "hypothesis", "ruff", "torchmetrics", "polars", "duckdb", "hatchling", "uv"}

    for number in range(8):
        path = tmp_path / "sounds" / ("low" if number % 2 else "high") / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(16_000) / (9 if number % 2 else 2)) / 2, 16_000)
    network = teacher.create_model("ast_tiny", num_classes=2)
    facts = {"stage": "teacher", "model": "ast_tiny", "kwargs": {}, "classes": 2}
    with torch.no_grad():
        network.get_classifier().get_parameter("bias").copy_(torch.tensor([-2.0, -3.0]))
    save_weights(tmp_path / "ast.safetensors", network.state_dict(), {**facts, "vocabulary_sha256": CLASSES.sha256})
    small = ["--model", "mn01", "--model-options.n_mels", "40", "--model-options.hopsize", "1600", "--batch-size", "4"]
    run(environment, tmp_path, "pipeline", "ingest", "folder", "--audio", "sounds", "--out", "data")
    run(
        *(environment, tmp_path, "pipeline", "teacher-logits", "--data", "data"),
        *("--teacher", "ast_tiny=ast.safetensors", "--store", "store"),
    )
    run(
        *(environment, tmp_path, "pipeline", "train-student", "--data", "data", "--store", "store", "--run", "run"),
        *("--eval-data", "data", "--epochs", "1", "--workers", "0", "--device", "cpu", "--cache", "cache", *small),
    )
    best = ["--checkpoint", "run/best.safetensors", "--device", "cpu"]
    assert "mAP" in run(environment, tmp_path, "pipeline", "evaluate", *best, "--data", "data", "--workers", "0")
    said = run(environment, tmp_path, "pipeline", "tag", "sounds/low/1.wav", *best)
    assert re.search(r"high|low", said)
