"""Scoring on several processes, which Ray starts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import student
from pipeline.commands.evaluate import EvaluateConfig, run
from pipeline.dataset.manifest import Manifest
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from pipeline.scoring import ray_scoring
whole = ray_scoring._Scorer.__ray_metadata__.modified_class._score
ray_scoring._MAX_BATCHES = 1
def once(self, batches):
    if batches:
        try:
            Path(os.environ["KILLED"]).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, batches)
ray_scoring._Scorer.__ray_metadata__.modified_class._score = once
from pipeline.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.ray
def test_two_ranks_of_which_one_is_killed_give_the_report_of_one_process(
    build_dataset: Callable[..., Manifest], make_noises: Callable, tmp_path: Path
) -> None:
    data, weights, out = build_dataset("data", make_noises(12, 5)), tmp_path / "small.safetensors", tmp_path / "ranks"
    model = student.create_model("mn01", num_classes=5, **COARSE)
    metadata = {"stage": "student", "model": "mn01", "kwargs": COARSE, "classes": 5}
    save_weights(weights, model.state_dict(), metadata | {"vocabulary_sha256": data.vocabulary.sha256})
    words = ["evaluate", "--data", data.location, "--checkpoint", str(weights), "--batch-size", "5", "--workers", "0"]
    words += ["--bootstrap", "0", "--ranks", "2", "--out", str(out)]
    command = [sys.executable, "-c", KILLED_ONCE, *words]
    killed = {**os.environ, "KILLED": str(tmp_path / "killed")}
    done = subprocess.run(command, env=killed, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    config = EvaluateConfig(
        data=data.location,
        checkpoint=(str(weights),),
        batch_size=5,
        workers=0,
        resampling=BootstrapConfig(bootstrap=0),
        out=str(tmp_path / "alone"),
    )
    run(config)
    for name in ("report.json", "per_class.csv"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
