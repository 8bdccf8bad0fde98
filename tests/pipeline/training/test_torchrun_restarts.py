"""Under `torchrun --max-restarts` a run survives the loss of a rank by itself, to the same bits."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from several_ranks import run_ranks

from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.runtime.recipes import to_toml
from pipeline.training.checkpoints import list_checkpoints

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]


def kill_rank(launcher: int, number: int) -> None:
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(number):
            process.kill()


def test_a_run_whose_rank_is_killed_goes_on_to_the_uninterrupted_weights(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    straight = TrainStudentConfig(
        data=str(make_dataset(tmp_path / "data", clips=8)),
        run=str(tmp_path / "straight"),
        cache=str(tmp_path / "cache"),
        model="mn01",
        epochs=8,
        batch_size=4,
        workers=0,
        device="cpu",
        checkpoint_minutes=0,
        keep_checkpoints=100,
    )
    assert [outcome.steps for outcome in run_ranks(2, run, straight)] == [16, 16]
    (tmp_path / "recipe.toml").write_text(to_toml(replace(straight, run=str(tmp_path / "run"))))
    command = [*TORCHRUN, "-m", "pipeline", "--", "train-student", "--config", str(tmp_path / "recipe.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        while len(list_checkpoints(tmp_path / "run")) < 3:
            assert launcher.poll() is None, launcher.communicate()[1][:6000]
            time.sleep(0.01)
        kill_rank(launcher.pid, 1)
        said = launcher.communicate(timeout=150)[1]
        assert launcher.returncode == 0, said[:6000]
    assert "resuming after step" in said
    expected, found = (load_file(tmp_path / name / "last.safetensors") for name in ("straight", "run"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
