"""No process of ours that has threads is forked: the copy could wait for ever for a lock that no thread of it holds.

Ray forks the process that asks it to start on this machine, which has threads by then, for each of its daemons
(`subprocess` with a `preexec_fn`, in `ray._private.services`); Ray alone could change that. Their stack tells them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[3]

HOOK = """
import os, sys, traceback, warnings

def look():
    stack = "".join(traceback.format_stack())
    of_ray = os.path.join("ray", "_private", "services.py") in stack
    with_threads = len(os.listdir("/proc/self/task")) > 1
    if of_ray:
        open(os.environ["FORKS"] + ".ray", "a").close()
    if with_threads and not of_ray:
        with open(os.environ["FORKS"], "a") as file:
            file.write(" ".join(sys.argv) + "\\n" + stack)

os.register_at_fork(before=look)
with open(os.environ["FORKS"] + ".watched", "a") as file:
    file.write(" ".join(sys.orig_argv[-3:]).replace("\\n", " ") + "\\n")
if sys.version_info >= (3, 12):
    warnings.filterwarnings("error", message=".*is multi-threaded", category=DeprecationWarning)
    # A `preexec_fn` is Ray's; of one of ours `look` tells.
    warnings.filterwarnings("ignore", message=".*is multi-threaded", category=DeprecationWarning, module="subprocess")
"""
SMALL = ["--model", "mn01", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run a command whose processes all tell when they fork with threads; gives what was told."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    forks = tmp_path / "forks.txt"
    path = os.pathsep.join([str(tmp_path / "hook"), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "FORKS": str(forks)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "decoding.worker" in forks.with_suffix(".txt.watched").read_text(), "the hook is in decoders, too"
        return forks.read_text() if forks.exists() else ""

    return run


def test_the_hook_tells_of_a_fork_with_threads(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    program = "import os, threading as t, time; t.Thread(target=time.sleep, args=[1]).start(); os.fork() or os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FORKS": str(tmp_path / "forks.txt")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, timeout=30, check=False)
    assert "in look" in (tmp_path / "forks.txt").read_text()


def test_ingest_training_and_evaluation_fork_no_process_with_threads(run: Callable[..., str], tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "sounds" / f"kind{number % 2}" / f"clip{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(8000) / (3 + number)) / 2, 16_000)
    assert not run("ingest", "folder", "--audio", "sounds", "--out", "data", "--workers", "1")
    data = ("--data", "data", "--eval-data", "data")
    assert not run("train-student", *data, "--run", "run", "--workers", "1", *SMALL)
    evaluated = ("--checkpoint", "run/best.safetensors", "--data", "data", "--device", "cpu", "--workers", "1")
    assert not run("evaluate", *evaluated, "--out", "report")


@pytest.mark.ray
def test_stage_1_forks_no_process_with_threads(
    run: Callable[..., str], build_dataset: Callable, make_noises: Callable, make_teacher: Callable, tmp_path: Path
) -> None:
    data = build_dataset("data", make_noises(4, 5)).location
    assert not run("teacher-logits", "--data", data, "--store", "store", "--teacher", make_teacher("passt_tiny"))
    assert (tmp_path / "forks.txt.ray").exists(), "what tells Ray's forks from ours would not be needed"
