"""macOS and Windows, as far as they can be had on another system: what they lack is hidden from the project's code."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_stores import fill_store

from pipeline.dataset.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, pkgutil
for package in ("pipeline", "student", "teacher"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
RUN_LINES = """
import shlex, sys
from pipeline.cli import run
if __name__ == "__main__":
    for line in sys.stdin:
        print(line)
        if code := run(shlex.split(line)):
            sys.exit(code)
"""
SMALL = (
    "--model mn01 --model-options.n_mels 40 --model-options.hopsize 1600 --batch-size 4 --device cpu "
    "--checkpoint-minutes 0 --evaluate-every 1 --cache cache"
)


@pytest.fixture
def on_bare_platform(tmp_path: Path) -> Callable[..., str]:
    """Returns `run(script, lines="", hidden="")`: runs a script in `tmp_path` without what only Linux has."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copyfile(ROOT / "tests" / "bare_platform.py", site / "sitecustomize.py")

    def run(script: str, lines: str = "", hidden: str = "") -> str:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
            "PYTHONWARNDEFAULTENCODING": "1",
            "HIDDEN_LIBRARIES": hidden,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, env=environment, input=lines, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def test_every_module_is_imported_without_what_only_linux_has(on_bare_platform: Callable[..., str]) -> None:
    files = [path for package in ("pipeline", "student", "teacher") for path in (ROOT / package).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if "__" not in path.stem}
    assert named
    assert named <= set(on_bare_platform(IMPORT_ALL).split())


def test_a_dataset_is_made_and_a_student_trained_evaluated_and_used_without_what_only_linux_has(
    on_bare_platform: Callable[..., str], tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    for number in range(8):
        path = tmp_path / "sounds" / ("höher" if number % 2 else "tiefer") / f"clip{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(8000) / (3 + number)) / 2, 16_000)
    manifest = read_manifest(make_dataset(tmp_path / "tones", clips=8))
    fill_store(tmp_path / "store", manifest, np.zeros((8, 4)))
    lines = f"""\
ingest folder --audio sounds --out data --workers 2 --clips-per-shard 4
train-student --data tones --store store --run distilled {SMALL} --workers 0 --epochs 1
train-student --data data --eval-data data --run labels --cache-audio {SMALL} --workers 1 --epochs 1
train-student --data data --eval-data data --run labels --cache-audio {SMALL} --workers 0 --resume --epochs 2
verify data --decode
verify labels
inspect store --data tones
evaluate --checkpoint labels/best.safetensors --data data --out report --device cpu --workers 0
tag sounds/höher/clip1.wav --checkpoint labels/best.safetensors --device cpu
"""
    said = on_bare_platform(RUN_LINES, lines, hidden="ray")
    assert "höher" in said.rpartition("tag sounds")[2].partition("\n")[2]
