import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.errors import UsageError

pytestmark = pytest.mark.ray

CPUS_OF_RAY = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from pipeline.runtime.ray_session import running_ray
import ray
with running_ray(None):
    print(ray.cluster_resources()["CPU"])
"""

ONE_TASK = """
from pipeline.runtime.ray_session import running_ray
import ray
with running_ray(None):
    print(ray.get(ray.remote(lambda: "done").remote()))
"""

STARTS = """
from pipeline.runtime.ray_session import running_ray
with running_ray(None):
    print("done")
"""

SLOW_FIRST_START = """
import sys
from ray._private import services
executable = services.GCS_SERVER_EXECUTABLE
with open("slow", "w") as script:
    script.write(f'#!/bin/sh\\necho $$ >> started\\nmkdir first && exec sleep 600\\nexec "{executable}" "$@"\\n')
import os
os.chmod("slow", 0o755)
services.GCS_SERVER_EXECUTABLE = os.path.abspath("slow")
"""


LOST_HEAD = """
import socket, time
from pipeline.runtime import ray_session
from pipeline.runtime.stopping import stop_on_signals
ray_session._HEAD_SECONDS, ray_session._LOOK_SECONDS = 1.0, 0.5
head = socket.create_server(("127.0.0.1", 0))
with ray_session._head_watched(f"127.0.0.1:{head.getsockname()[1]}"), stop_on_signals() as stop:
    time.sleep(2)
    assert not stop.requested
    head.close()
    time.sleep(1000)  # as whoever waits for the cluster to stop
"""

STOPPED_HEAD = """
import psutil
from pipeline.runtime import ray_session
from ray.cluster_utils import Cluster
ray_session._END_SECONDS = 2.0
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "object_store_memory": 80 * 2**20})
with ray_session.running_ray(cluster.address):
    [head] = [child for child in psutil.Process().children() if child.name() == "gcs_server"]
    head.suspend()
print("left")
"""

HEAD = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "object_store_memory": 80 * 2**20})
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""

JOINS = """
import sys
from pipeline.runtime import ray_session
import ray
ray.__version__ = sys.argv[2]
with ray_session.running_ray(sys.argv[1]):
    pass
"""

ENDED = """
from pipeline.runtime import ray_session
import ray
with ray_session.running_ray(None):
    pass
try:
    ray.put("what a thread of Ray Data's might still do")
finally:
    print(ray.is_initialized())
"""

STOPPED_DAEMON = """
import psutil
from pipeline.runtime import ray_session
ray_session._END_SECONDS = 2.0
with ray_session.running_ray(None):
    [daemon] = [child for child in psutil.Process().children() if child.name() == "raylet"]
    daemon.suspend()
print(psutil.Process().children(recursive=True))
"""


def run(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes can't be bound to cores")
def test_ray_of_this_machine_has_the_cores_that_may_be_used() -> None:
    done = subprocess.run([sys.executable, "-c", CPUS_OF_RAY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0"]


def test_ray_runs_where_the_temporary_folder_has_a_long_path_and_the_home_folder_can_t_be_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("x" * 90)  # no socket can be opened there
    folder.mkdir()
    (tmp_path / "file").touch()
    home = str(tmp_path / "file/home")
    done = run(ONE_TASK, tmp_path, TMPDIR=str(folder), HOME=home, RAY_AUTH_MODE="token")
    assert done.stdout.split() == ["done"], done.stderr


def test_ray_that_does_not_come_up_in_time_is_started_once_more(tmp_path: Path) -> None:
    done = run(SLOW_FIRST_START + STARTS, tmp_path, RAY_gcs_server_port_wait_time_s="5")
    assert done.stdout.split() == ["done"], done.stderr
    slow, _ = (int(number) for number in (tmp_path / "started").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(slow, 0)


def test_ray_that_never_comes_up_is_one_error_that_names_its_logs(tmp_path: Path) -> None:
    never = SLOW_FIRST_START.replace("mkdir first && ", "")
    done = run(never + STARTS, tmp_path, RAY_gcs_server_port_wait_time_s="2")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pipeline.errors.PipelineError: Ray can't be started on this machine: ")
    assert "session_latest/logs" in last
    assert "trying once more" in done.stderr


def test_a_head_that_goes_away_ends_whatever_waits_for_the_cluster_with_a_word(tmp_path: Path) -> None:
    done = run(LOST_HEAD, tmp_path)
    assert done.returncode == 1
    assert "LostProcessError: the head of the Ray cluster at 127.0.0.1:" in done.stderr.splitlines()[-1]
    assert "is gone. Start the cluster again" in done.stderr.splitlines()[-1]


def test_a_daemon_of_ray_that_stands_still_does_not_keep_a_command_from_its_end(tmp_path: Path) -> None:
    done = run(STOPPED_DAEMON, tmp_path)
    assert done.stdout.split() == ["[]"], done.stderr
    assert "Ray has not ended within 2 s: its processes are killed" in done.stderr


def test_a_head_that_stands_still_does_not_keep_a_command_from_leaving_its_cluster(tmp_path: Path) -> None:
    done = run(STOPPED_HEAD, tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["left"]), done.stderr
    assert "has not answered for 2 s: left all the same" in done.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster that wants a token."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", HEAD], env=environment, **options) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=60)


def complaint_of_joining(head: str, version: str, token: str) -> str:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-c", JOINS, head, version]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1]


def test_a_wrong_token_is_refused_in_one_line_with_what_to_give(head: str) -> None:
    complaint = complaint_of_joining(head, version("ray"), "b" * 64)
    assert complaint.startswith(f"pipeline.errors.UsageError: --address {head}: the cluster wants its token")


def test_a_cluster_of_another_ray_is_refused_in_one_line_with_both_versions(head: str) -> None:
    complaint = complaint_of_joining(head, "2.0.0", "a" * 64)
    assert complaint.startswith(f"pipeline.errors.UsageError: --address {head}: Version mismatch")
    assert f"The cluster was started with: Ray: {version('ray')} Python: {platform.python_version()} This" in complaint
    assert "was started with: Ray: 2.0.0 Python: " in complaint
    assert complaint.endswith("Give every machine the same image or installation")


def test_nothing_starts_or_joins_a_ray_once_the_session_has_ended(tmp_path: Path) -> None:
    assert run(ENDED, tmp_path).stdout.split() == ["False"]


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a server that speaks Ray's protocol, but is no head of a cluster."""
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_what_is_no_head_of_a_cluster_is_told_within_seconds(stranger: str) -> None:
    from pipeline.runtime.ray_session import running_ray

    with pytest.raises(UsageError, match=f"--address {stranger}: what answers there is no head"), running_ray(stranger):
        pass


@pytest.mark.parametrize("module", ["ingest.packing_pool", "labelling.actor_pool", "training.ray_ranks"])
def test_a_machine_without_ray_says_so_in_one_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in (f"pipeline.{module}", "pipeline.runtime.ray_session"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UsageError, match=r"^Ray, .* is not installed here"):
        importlib.import_module(f"pipeline.{module}")
