"""The cluster files pass Ray's own checks, and the script that `ray submit` uploads runs by itself."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ["aws", "on_premise"]


def _cluster(name: str) -> dict:
    return yaml.safe_load((ROOT / f"manifests/clusters/{name}.yaml").read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_file_passes_rays_own_check(name: str) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="this Ray has no cluster launcher")
    util.validate_config(util.prepare_config(_cluster(name)))


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_installs_from_the_lock_with_hashes(name: str) -> None:
    commands = "\n".join(_cluster(name)["setup_commands"])
    assert "--require-hashes --constraint requirements.lock" in commands


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_is_locked_with_a_token_and_starts_jobs_from_loopback_alone(name: str) -> None:
    cluster = _cluster(name)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in cluster["setup_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_every_machine_on_the_premises_is_started() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="this Ray has no cluster launcher")
    scheduler = pytest.importorskip("ray.autoscaler._private.resource_demand_scheduler")
    cluster = _cluster("on_premise")
    prepared = util.prepare_config(cluster)
    head = prepared["head_node_type"]
    _, _, added = scheduler._add_min_workers_nodes(
        [{}], {head: 1}, prepared["available_node_types"], prepared["max_workers"], head, [], lambda *_: None
    )
    assert added == {head: len(cluster["provider"]["worker_ips"])}
    assert "RAY_enable_autoscaler_v2=0 ray start" in cluster["head_start_ray_commands"][-1]  # whose scheduler that is


def test_the_script_that_ray_submit_uploads_needs_no_other_file(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pipeline/__main__.py", tmp_path)
    command = [sys.executable, str(tmp_path / "__main__.py"), "--version"]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == version("audioset-distill")
