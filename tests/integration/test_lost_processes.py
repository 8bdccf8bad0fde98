"""Trainings whose helpers die, stand still or have no shared memory: one line, everything saved, nobody left behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipeline.training.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), clips=8)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a training without an end in `tmp_path/run`, which saves after each step; ends it after the test."""
    with ExitStack() as stack:

        def start(
            *flags: str, epochs: int = 100_000, before: tuple[str, ...] = (), **environment: str
        ) -> subprocess.Popen[str]:
            command = [*before, sys.executable, "-m", "pipeline", "train-student", "--data", str(data)]
            command += ["--run", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--model", "mn01"]
            command += ["--batch-size", "4", "--device", "cpu", "--epochs", str(epochs), "--checkpoint-minutes", "0"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            process = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def helpers_of(process: subprocess.Popen[str], run: Path) -> list[psutil.Process]:
    """Returns the decoding processes of a training, once it trains."""
    while len(list_checkpoints(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return psutil.Process(process.pid).children()


def complaint(process: subprocess.Popen[str], *, within: float) -> str:
    """Returns the one line that a training ended with."""
    asked = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - asked < within
    assert process.returncode == 1, said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.splitlines()[-1] == line
    assert "Traceback" not in said
    return line


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "was killed (SIGKILL)"), (signal.SIGSTOP, "no sign of life for 2 s: it is stopped, by SIGSTOP")],
)
def test_a_decoding_process_that_is_lost_ends_training_with_a_word_and_all_saved(
    start: Start, tmp_path: Path, number: signal.Signals, said: str
) -> None:
    process = start("--workers", "2", "--patience", "2")
    helpers = helpers_of(process, tmp_path / "run")
    helpers[0].send_signal(number)
    line = complaint(process, within=20)
    assert line.startswith("error: decoding process ")
    assert said in line
    newest = int(list_checkpoints(tmp_path / "run")[-1].stem.removeprefix("step-"))
    assert line.endswith(f"all up to step {newest} is kept, and --resume goes on from there")
    assert not psutil.wait_procs(helpers, timeout=10)[1]


def test_a_training_can_be_stopped_whatever_its_decoding_processes_do(start: Start, tmp_path: Path) -> None:
    process = start("--workers", "2")
    helpers = helpers_of(process, tmp_path / "run")
    for helper in helpers:
        helper.suspend()
    newest = None
    while newest != (newest := list_checkpoints(tmp_path / "run")[-1]):  # until training waits for them
        time.sleep(1)
    process.terminate()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143
    assert "all is saved, and --resume goes on" in said
    assert not psutil.wait_procs(helpers, timeout=10)[1]


def test_decoding_processes_need_no_shared_memory_device(start: Start) -> None:
    alone = ("unshare", "--mount", "--map-root-user")
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("a mount of one's own needs unshare, and to be allowed")
    small = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    process = start("--workers", "2", epochs=1, before=(*alone, "bash", "-c", small, "small"))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said


def test_a_rank_that_is_stopped_ends_the_others_with_a_word_and_all_saved(start: Start, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    first, other = (start("--workers", "0", "--patience", "2", RANK=rank, LOCAL_RANK=rank, **there) for rank in "01")
    helpers_of(first, tmp_path / "run")
    other.send_signal(signal.SIGSTOP)
    line = complaint(first, within=30)
    assert line.startswith(f"error: rank 1 of 2 (process {other.pid} on ")
    assert "no sign of life for 2 s: it is stopped, by SIGSTOP" in line
    newest = int(list_checkpoints(tmp_path / "run")[-1].stem.removeprefix("step-"))
    assert line.endswith(f"all up to step {newest} is kept, and --resume goes on from there")
