"""Stage 1 on Ray: what dies or stands still on the way is told, and nothing is lost."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.logits.store import open_store

SHARDS = 24


@pytest.fixture
def manifest(build_dataset: Callable, make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(3 * SHARDS, 5), clips_per_shard=3)


@pytest.fixture
def command(manifest: Manifest, make_teacher: Callable, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Stage 1 at work, of so many shards that the rest takes longer than a signal."""
    program = [sys.executable, "-m", "pipeline", "teacher-logits", "--data", manifest.location, "--patience", "6"]
    program += ["--teacher", make_teacher("passt_tiny"), "--store", str(tmp_path / "store"), "--cpus-per-actor", "1"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE)
    while not list((tmp_path / "store").glob("tiny-*.parquet")):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait(10)


def below(process: subprocess.Popen[bytes], mark: str) -> list[psutil.Process]:
    """Returns the processes that a command has started whose command line has some words."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if mark in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


@pytest.mark.ray
def test_decoders_that_are_stopped_are_told_and_nothing_is_lost(
    command: subprocess.Popen[bytes], manifest: Manifest, tmp_path: Path
) -> None:
    decoders = below(command, "decoding.worker")
    assert decoders
    for decoder in decoders:
        decoder.suspend()
    told = command.communicate(timeout=120)[1].decode()
    assert command.returncode == 0, told
    assert "was begun again: decoding process 1 of 1" in told
    assert "no sign of life for 6 s: it is stopped, by SIGSTOP" in told
    assert open_store(str(tmp_path / "store")).clip_count == len(manifest)
    assert not any(decoder.is_running() for decoder in decoders)


@pytest.mark.ray
def test_an_actor_that_is_stopped_ends_the_run_in_one_line_and_its_decoders_with_it(
    command: subprocess.Popen[bytes],
) -> None:
    [actor] = below(command, "MapWorker")
    decoders = below(command, "decoding.worker")
    actor.send_signal(signal.SIGSTOP)
    told = command.communicate(timeout=120)[1].decode()
    assert command.returncode == 1, told
    assert re.search(
        r"error: there has been no sign of life of the work on Ray for 6 s; under way: (tiny-0000|worker 0)", told
    )
    assert "Traceback" not in told
    assert decoders
    assert not psutil.wait_procs([actor, *decoders], timeout=20)[1], "the actor was killed, and they end with it"
