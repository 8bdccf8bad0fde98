"""Small machines for real: containers with addresses, files, memory and shared memory of their own, on one host.

`make cluster-test` runs this with podman or Docker and the image of the Dockerfile's `pipeline` target, which is built
where it is missing; the code in it is this checkout's. It takes some minutes and leaves nothing behind. ENGINE and
IMAGE choose others.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGE = os.environ.get("IMAGE", "audioset-distill:0.1.0")
CLIPS = 180
SLOW_TEACHER = """
import csv
import time
import torch
from torch import nn

class Loudness(nn.Module):
    sample_rate_hz = 16000
    input_seconds = 2.0
    class_names = tuple(row["display_name"] for row in csv.DictReader(open("/site/train/classes.csv")))

    def __init__(self):
        super().__init__()
        self.front_end = nn.Identity()

    def forward(self, features):
        time.sleep(0.3)
        return features.abs().mean(dim=1, keepdim=True) - torch.arange(527)
"""
ARRIVED = """
import ray, sys, time
ray.init("head:6379", log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) != {count}:
    time.sleep(0.5)
print("all are there")
"""


SAME_WEIGHTS = """
import torch
from safetensors.torch import load_file
straight, stopped = (load_file(f"/runs/{run}/last.safetensors") for run in ("straight", "stopped"))
print(all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items()))
"""


def engine() -> str:
    """Returns docker or podman, or skips."""
    found = os.environ.get("ENGINE") or next(filter(shutil.which, ("podman", "docker")), None)
    if found is None:
        pytest.skip("neither podman nor docker is installed")
    return found


class Machines:
    """Containers on a network of their own, hardened as docker-compose.yml has them."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.name = engine(), f"distill-test-{os.getpid()}"
        self.folder, self._token = folder, secrets.token_hex(32)
        self._started: list[str] = []

    def do(self, *words: str, check: bool = True, seconds: float = 300, streams: bool = False) -> str:
        """Have the engine do something; returns what it printed, on both streams where that is asked for."""
        # podman's monitor leaves a file where it is started when a container's memory runs out.
        kept = {"capture_output": True, "text": True, "cwd": self.folder}
        done = subprocess.run([self.engine, *words], timeout=seconds, check=False, **kept)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + (done.stderr if streams else "")

    def start(
        self, machine: str, *command: str, memory: str = "3g", disk: str = "1g", code: Path = ROOT, again: bool = False
    ) -> None:
        """Start a machine with one core."""
        hardening = (
            "--read-only",
            "--user=10001:10001",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--init",
        )
        limits = ("--cpus=1", f"--memory={memory}", "--shm-size=256m", f"--tmpfs=/tmp:rw,size={disk},mode=1777")
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "PYTHONPATH": "/code:/site"}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        mounts = (f"{self.name}:/runs", f"{code}:/code:ro", f"{self.folder}:/site:ro")
        self._started.append(self.called(machine))
        self.do(
            *("run", "--detach", f"--name={self.called(machine)}", f"--hostname={machine}"),
            *(f"--network={self.name}", f"--network-alias={machine}", *hardening, *limits),
            *(f"--restart={'unless-stopped' if again else 'no'}",),
            *(f"--env={name}={value}" for name, value in variables.items()),
            *(f"--volume={mount}" for mount in mounts),
            *(IMAGE, *command),
        )

    def start_head(self) -> None:
        """Start the head, without cores for Ray."""
        options = ("--head", "--block", "--port=6379", "--num-cpus=0", "--object-store-memory=100000000")
        self.start("head", "ray", "start", *options, again=True, memory="4g")

    def start_worker(self, machine: str, **limits: object) -> None:
        """Start a machine for one actor or rank, which comes back when its Ray ends, as docker-compose.yml has it."""
        options = ("--block", "--address=head:6379", "--num-cpus=1", "--object-store-memory=100000000")
        self.start(machine, "ray", "start", *options, again=True, **limits)  # pyright: ignore[reportArgumentType]

    def called(self, machine: str) -> str:
        """Returns what the engine calls it."""
        return f"{self.name}-{machine}"

    def at(self, machine: str, *command: str, check: bool = True) -> str:
        """Run something on a machine; returns what it printed."""
        return self.do("exec", self.called(machine), *command, check=check)

    def remove(self, machine: str) -> None:
        """Let a machine vanish."""
        self.do("rm", "--force", "--time=0", self.called(machine))

    def cut_off(self, machine: str) -> None:
        """Take a machine off the network."""
        self.do("network", "disconnect", "--force", self.name, self.called(machine))

    def plug_in(self, machine: str) -> None:
        """Put it back, at whatever address."""
        self.do("network", "connect", f"--alias={machine}", self.name, self.called(machine))

    def wait_for(self, count: int) -> None:
        """Wait until so many machines are there, the head included; on a busy host one may have to start twice."""
        words = ("timeout", "100", "python", "-c", ARRIVED.format(count=count))
        self.until(lambda: "all are there" in self.at("head", *words, check=False), 240)

    @contextmanager
    def pipeline(self, *words: str) -> Iterator["Command"]:
        """A command on the head, under way."""
        log = self.folder / f"{secrets.token_hex(4)}.log"
        called = [self.engine, "exec", self.called("head"), "pipeline", *words]
        with open(log, "wb") as file, subprocess.Popen(called, stdout=file, stderr=file) as process:
            try:
                yield Command(process, log)
            finally:
                process.kill()

    def job(self, *words: str, name: str, wait: bool = True) -> str:
        """A command as a job, which has five minutes to save; returns what it said, where that is waited for."""
        grace = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'
        options = [f"--submission-id={name}", f"--runtime-env-json={grace}", *([] if wait else ["--no-wait"])]
        return self.at("head", "ray", "job", "submit", "--address=http://127.0.0.1:8265", *options, "--", *words)

    def stop_job(self, name: str) -> None:
        """Ask a job to end, and wait until it has."""
        self.at("head", "ray", "job", "stop", "--address=http://127.0.0.1:8265", name)

    def hashes(self, files: str) -> list[str]:
        """Returns the names and hashes of some files below /runs."""
        folder, _, names = files.rpartition("/")
        return self.at("head", "sh", "-c", f"cd /runs/{folder}; sha256sum {names}").splitlines()

    def parts(self, store: str) -> int:
        """Returns how many parts a store has."""
        return len(self.at("head", "sh", "-c", f"ls /runs/{store}/*.parquet 2> /dev/null", check=False).split())

    def until(self, condition: Callable[[], object], seconds: float = 180) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.5)

    def clean_up(self) -> None:
        """Leave nothing behind."""
        for machine in self._started:
            self.do("rm", "--force", "--time=0", machine, check=False)
        self.do("volume", "rm", "--force", self.name, check=False)
        self.do("network", "rm", "--force", self.name, check=False)


class Command:
    """A command under way, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    @property
    def said(self) -> str:
        """So far."""
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], object], seconds: float = 180) -> None:
        """Wait until something is so while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.5)

    def ends(self, seconds: float = 300) -> int:
        """Wait for its end; returns the exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said) from None


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head and two workers, and a dataset of 45 shards."""
    folder = tmp_path_factory.mktemp("site")
    folder.chmod(0o755)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)
    (folder / "slow_teacher.py").write_text(SLOW_TEACHER)
    sample = ROOT / "manifests/sample"
    ingest = [sys.executable, "-m", "pipeline", "ingest", "audioset", "--clips-per-shard", "4"]
    ingest += ["--segments", str(sample / "balanced_train_segments.csv"), "--audio", str(sample / "audio")]
    subprocess.run([*ingest, "--out", str(folder / "train")], check=True, capture_output=True, timeout=120)
    made = Machines(folder)
    if not made.do("images", "--quiet", IMAGE):
        build = [made.engine, "build", "--target", "pipeline", "--tag", IMAGE, str(ROOT)]
        built = subprocess.run(build, capture_output=True, text=True, timeout=3000, check=False)
        if built.returncode:
            pytest.skip(f"{IMAGE} is missing and can't be built here: {built.stderr.strip().splitlines()[-1]}")
    try:
        made.do("network", "create", made.name)
        made.start_head()
        made.start_worker("w1")
        made.start_worker("w2")
        made.wait_for(3)
        yield made
    finally:
        made.clean_up()


def stage_1(store: str, *flags: str) -> list[str]:
    words = ["teacher-logits", "--address", "auto", "--cpus-per-actor", "1", "--precision", "float32"]
    words += ["--data", "/site/train", "--teacher", "slow_teacher:Loudness", "--batch-size", "1"]
    return [*words, "--store", f"/runs/{store}", *flags]


def stage_2(run: str, epochs: int = 3) -> list[str]:
    words = ["pipeline", "train-student", "--address", "auto", "--ranks", "2", "--data", "/site/train"]
    words += [
        "--model",
        "mn01",
        "--batch-size",
        "20",
        "--epochs",
        f"{epochs}",
        "--clips-per-epoch",
        "100",
        "--workers",
        "0",
    ]
    return [*words, "--device", "cpu", "--run", f"/runs/{run}"]


def test_a_machine_that_is_cut_off_and_comes_back_and_one_that_joins_lose_nothing(
    machines: Machines,
) -> None:
    with machines.pipeline(*stage_1("cut", "--actors", "2:3")) as command:
        command.until(lambda: machines.parts("cut") >= 2)
        machines.cut_off("w2")
        machines.start_worker("w3")
        time.sleep(10)
        machines.plug_in("w2")
        assert command.ends() == 0, command.said
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in command.said
    machines.remove("w3")


def test_a_machine_killed_for_memory_costs_its_work_alone(machines: Machines) -> None:
    machines.start_worker("small", memory="400m")
    with machines.pipeline(*stage_1("memory", "--actors", "2:3")) as command:
        assert command.ends() == 0, command.said
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in command.said
    machines.remove("small")


def test_a_machine_with_a_full_disk_costs_its_work_alone(machines: Machines) -> None:
    machines.start_worker("full", disk="200m")
    machines.wait_for(4)
    with machines.pipeline(*stage_1("disk", "--actors", "3")) as command:
        command.until(lambda: machines.parts("disk") >= 2)
        machines.at("full", "dd", "if=/dev/zero", "of=/tmp/filler", "bs=1M", check=False)
        assert command.ends() == 0, command.said
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in command.said
    machines.remove("full")


def other_image(folder: Path) -> Path:
    """Returns a copy of the program, to be changed."""
    for package in ("pipeline", "teacher", "student", "manifests"):
        shutil.copytree(ROOT / package, folder / package)
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    return folder


def test_machines_of_unlike_images_are_left_out_and_named(machines: Machines, tmp_path: Path) -> None:
    other, unlike = other_image(tmp_path / "other"), other_image(tmp_path / "unlike")
    with open(other / "pipeline/errors.py", "a") as module:
        module.write("# another version\n")
    (unlike / "torch-2.10.0.dist-info").mkdir()
    (unlike / "torch-2.10.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.10.0\n")
    machines.start_worker("other", code=other)
    machines.start_worker("unlike", code=unlike)
    machines.wait_for(5)
    with machines.pipeline(*stage_1("versions", "--actors", "4")) as command:
        assert command.ends() == 0, command.said
    assert "other is left out: it can't load the teachers, tried twice: other has audioset-distill" in command.said
    assert "tried twice: unlike has torch 2.10.0, but the run was started by torch 2.1" in command.said
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in command.said
    machines.remove("other")
    machines.remove("unlike")


def test_a_machine_with_another_ray_cannot_join_and_says_why(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.0.0'\n")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    machines.start_worker("old", code=tmp_path)
    told = "The cluster was started with:"
    machines.until(lambda: told in machines.do("logs", machines.called("old"), streams=True), 120)
    assert "Ray: 2.0.0" in machines.do("logs", machines.called("old"), streams=True)
    machines.remove("old")


def test_a_job_of_stage_1_that_is_stopped_goes_on_to_the_same_bits(machines: Machines) -> None:
    words = ["pipeline", *stage_1("job", "--actors", "2")]
    machines.job(*words, name="label", wait=False)
    machines.until(lambda: machines.parts("job") >= 2)
    machines.stop_job("label")
    assert 2 <= machines.parts("job") < CLIPS // 4
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in machines.job(*words, name="label-again")
    assert machines.hashes("job/train-*.parquet") == machines.hashes("cut/train-*.parquet")


def test_a_job_of_stage_2_that_is_stopped_saves_and_goes_on_to_the_same_bits_and_is_scored_as_a_job(
    machines: Machines,
) -> None:
    machines.job(*stage_2("straight", epochs=8), name="train")
    words = stage_2("stopped", epochs=8)
    machines.job(*words, name="train-stopped", wait=False)
    machines.until(lambda: "epoch/" in machines.at("head", "cat", "/runs/stopped/metrics.jsonl", check=False))
    machines.stop_job("train-stopped")
    assert "epoch 8/8" in machines.job(*words, "--resume", name="train-again")
    assert machines.at("head", "python", "-c", SAME_WEIGHTS).split() == ["True"]
    words = ["pipeline", "evaluate", "--address", "auto", "--ranks", "2", "--data", "/site/train", "--bootstrap", "0"]
    assert "of 527 classes" in machines.job(*words, "--checkpoint", "/runs/stopped/last.safetensors", name="evaluate")


def test_ranks_on_two_machines_outlast_the_loss_of_one(machines: Machines) -> None:
    with machines.pipeline(*stage_2("lost")[1:], "--checkpoint-minutes", "0") as command:
        command.until(lambda: "epoch 1/3" in command.said, 240)
        machines.remove("w2")
        machines.start_worker("w4")
        assert command.ends() == 0, command.said
    assert "All ranks were started again" in command.said
    assert "epoch 3/3" in command.said


def test_a_head_that_comes_back_goes_on_with_what_is_missing(machines: Machines) -> None:
    with machines.pipeline(*stage_1("head", "--actors", "1")) as command:
        command.until(lambda: machines.parts("head") >= 2)
        machines.do("restart", "--time=0", machines.called("head"))
        assert command.ends() != 0
    machines.wait_for(3)
    with machines.pipeline(*stage_1("head", "--actors", "1")) as command:
        assert command.ends() == 0, command.said
    assert f"logits of {CLIPS} of {CLIPS} clips; 0 failed" in command.said
