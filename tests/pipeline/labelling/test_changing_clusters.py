"""Stage 1 on a real small cluster, a head without CPUs and raylets on loopback: machines come and go."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from busy_machine import tried_twice
from object_servers import ACCESS_KEY, SECRET_KEY, Fault, Proxy, S3Server

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.logits.store import open_store
from pipeline.storage.files import publish_bytes

pytestmark = pytest.mark.ray

SLOW_TEACHER = """
import time
import torch
from torch import nn

class Loudness(nn.Module):
    sample_rate_hz = 16000
    input_seconds = 2.0
    class_names = tuple(f"Sound {index}" for index in range(5))

    def __init__(self):
        super().__init__()
        self.front_end = nn.Identity()

    def forward(self, features):
        time.sleep(0.15)
        return features.abs().mean(dim=1, keepdim=True) - torch.arange(5)
"""
STORE_BYTES = 80 * 2**20
PATCHED = """
import sys
from pipeline.labelling import actor_pool, work_plan
from pipeline.runtime import ray_capacity
ray_capacity.TOLD_SECONDS = 2.0
actor_pool._SILENT_SECONDS = 5.0
{more}
from pipeline.cli import run
sys.exit(run(sys.argv[1:]))
"""
FEW_TRIES = "from pipeline.storage.remote import stores; stores._TRIES = 2"
SHORT_ORDERS = "work_plan._FIRST_SECONDS = work_plan._MOST_SECONDS = work_plan.ORDER_SECONDS = 0.1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, _session_proxy: Proxy) -> Iterator[Any]:
    """A head without CPUs; its machines find a teacher that takes its time and little of the processor."""
    import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported
    from ray.cluster_utils import Cluster  # isort: skip

    folder = tmp_path_factory.mktemp("site")
    (folder / "slow_teacher.py").write_text(SLOW_TEACHER)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(folder)]))
        bucket = {"ENDPOINT_URL": _session_proxy.endpoint, "DEFAULT_REGION": "us-east-1"}
        for name, value in {**bucket, "ACCESS_KEY_ID": ACCESS_KEY, "SECRET_ACCESS_KEY": SECRET_KEY}.items():
            patch.setenv(f"AWS_{name}", value)
        made = tried_twice(Cluster, initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


@pytest.fixture
def join(cluster: Any) -> Iterator[Callable[[], Any]]:
    """Lets a machine join, with one core if nothing else is said; all leave after the test."""
    joined = []

    def add(**resources: int) -> Any:
        has = {"num_cpus": 1, "object_store_memory": STORE_BYTES, **resources}
        joined.append(tried_twice(cluster.add_node, **has))
        return joined[-1]

    yield add
    for node in joined:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@contextmanager
def stage_1(manifest: Manifest, store: Path, *flags: str, more: str = "") -> Iterator[subprocess.Popen]:
    """Stage 1 as a program."""
    command = [sys.executable, "-c", PATCHED.format(more=more), "teacher-logits", "--data", manifest.location]
    command += ["--teacher", "slow_teacher:Loudness", "--cpus-per-actor", "1"]
    command += [] if "--store" in flags else ["--store", str(store)]
    command += ["--precision", "float32", *flags]
    with open(f"{store}.log", "wb") as log, subprocess.Popen(command, stderr=log, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], process: subprocess.Popen, store: Path) -> None:
    while not condition():
        assert process.poll() is None, said(store)
        time.sleep(0.02)


def said(store: Path) -> str:
    return Path(f"{store}.log").read_text()


def parts(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("tiny-*.parquet")}


def processes(name: str, *, below: int | None = None) -> list[psutil.Process]:
    """Returns the processes of the cluster, or of one of its machines, that Ray calls so."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def raylet_of(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


@pytest.fixture
def manifest(build_dataset: Callable, make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(160, 5), clips_per_shard=2)


def test_room_is_waited_for_with_a_word_and_machines_that_join_are_used_and_those_that_leave_cost_nothing(
    cluster: Any, join: Callable, manifest: Manifest, tmp_path: Path
) -> None:
    store, flags = tmp_path / "store", ("--address", cluster.address, "--actors", "1:2", "--batch-size", "1")
    with stage_1(manifest, store, *flags) as process:
        told = "each wants 1 CPU, and the cluster has no machine with a CPU or GPU for Ray yet"
        wait_until(lambda: told in said(store), process, store)
        first = join()
        wait_until(lambda: parts(store), process, store)
        second = join()
        wait_until(lambda: processes("MapWorker", below=raylet_of(second)), process, store)
        before = len(parts(store))
        wait_until(lambda: len(parts(store)) > before, process, store)
        [board] = processes("WorkBoard", below=raylet_of(cluster.head_node))
        board.kill()
        cluster.remove_node(first, allow_graceful=False)
        assert process.wait(100) == 0, said(store)
    assert open_store(str(store)).clip_count == len(manifest)
    assert not (store / ".ranges").exists()


def test_gpus_that_no_machine_has_are_waited_for_with_a_word(
    cluster: Any, join: Callable, manifest: Manifest, tmp_path: Path
) -> None:
    join()
    store = tmp_path / "store"
    with stage_1(manifest, store, "--address", cluster.address, "--gpus-per-actor", "1") as process:
        told = "each wants 1 GPU and 1 CPU, and the cluster has machines: 1 with 1 CPU; free is 1 CPU"
        wait_until(lambda: told in said(store), process, store)


def test_a_storage_that_is_away_for_a_while_costs_no_shard(
    cluster: Any,
    join: Callable,
    build_dataset: Callable,
    make_noises: Callable,
    tmp_path: Path,
    s3: S3Server,
    s3_proxy: Proxy,
    s3_folder: str,
) -> None:
    folder = s3.folder / s3_folder.removeprefix("s3://")
    for path in Path(build_dataset("data", make_noises(24, 5), clips_per_shard=2).location).iterdir():
        publish_bytes(f"{s3_folder}/data/{path.name}", path.read_bytes())
    join()
    manifest, store = read_manifest(f"{s3_folder}/data"), tmp_path / "store"
    flags = ("--address", cluster.address, "--batch-size", "1", "--store", f"{s3_folder}/store")
    with stage_1(
        manifest, store, *flags, more="from pipeline.storage.remote import stores; stores._TRIES = 2"
    ) as process:
        wait_until(lambda: list(folder.glob("store/tiny-*.parquet")), process, store)
        s3_proxy.faults = [Fault("status", 503, 100_000)]
        time.sleep(4)
        before = len(list(folder.glob("store/tiny-*.parquet")))
        s3_proxy.faults = []
        assert process.wait(100) == 0, said(store)
    assert before < 12
    assert "logits of 24 of 24 clips; 0 failed" in said(store)


def test_a_killed_run_goes_on_with_the_stretches_that_it_labelled_and_the_store_is_that_of_one_piece(
    cluster: Any, join: Callable, build_dataset: Callable, make_noises: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("large", make_noises(60, 5), clips_per_shard=60)
    join()
    store, whole, flags = tmp_path / "store", tmp_path / "whole", ("--address", cluster.address, "--batch-size", "2")
    with stage_1(manifest, store, *flags, more=SHORT_ORDERS) as process:
        wait_until(lambda: len(list(store.glob(".ranges/*.parquet"))) > 2, process, store)
        os.killpg(process.pid, signal.SIGKILL)
    assert not parts(store)
    with stage_1(manifest, store, *flags, more=SHORT_ORDERS) as process:
        assert process.wait(100) == 0, said(store)
    labelled = int(said(store).partition(" clips in ")[0].split()[-1])
    assert labelled < 60 - 2, "what the killed run labelled is not labelled again"
    with stage_1(manifest, whole, *flags) as process:
        assert process.wait(100) == 0, said(whole)
    assert parts(store) == parts(whole)


PLACED = """
import sys
from pipeline.labelling.actor_layout import fit_to_machines
from pipeline.runtime.ray_capacity import machines
from pipeline.runtime.ray_session import running_ray
import ray

class Actor:
    def machine(self):
        return ray.get_runtime_context().get_node_id()

with running_ray(sys.argv[1]):
    layout = fit_to_machines(machines(), None, None, None)
    claims = dict(num_cpus=layout.cpus_per_actor, num_gpus=layout.gpus_per_actor)
    actors = [ray.remote(**claims)(Actor).remote() for _ in range(layout.actors)]
    hosts = ray.get([actor.machine.remote() for actor in actors], timeout=60)
    of_hosts = [node["Resources"] for node in ray.nodes() if node["NodeID"] in hosts]
    idle = [sum(node.get(kind, 0) for node in of_hosts) - amount * len(actors) for kind, amount in
            (("CPU", layout.cpus_per_actor), ("GPU", layout.gpus_per_actor))]
    print(len(hosts), len(set(hosts)), *map(int, idle))
"""


def test_on_a_mixed_cluster_the_actors_find_room_and_leave_no_gpu_or_core_of_their_machines_idle(
    cluster: Any, join: Callable
) -> None:
    join(num_cpus=1)  # of its one core nobody's share comes
    join(num_cpus=4, num_gpus=2)
    placed = subprocess.run(
        [sys.executable, "-c", PLACED, cluster.address], capture_output=True, text=True, timeout=120, check=False
    )
    assert placed.stdout.split() == ["2", "1", "0", "0"], placed.stderr
