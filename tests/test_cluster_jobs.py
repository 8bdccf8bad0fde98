"""The jobs for Kubernetes and SLURM are what those read, and run both stages with flags that there are."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "manifests/clusters/slurm.sbatch"
STAGES, JOB = yaml.safe_load_all((ROOT / "manifests/clusters/kuberay.yaml").read_text())
STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long `ray job stop` waits for a job that saves, in seconds; Ray reads it in the job's environment."""


def check_flags(words: list[str]) -> None:
    assert words[0] == "pipeline"
    build_app().parse_args(words[1:], exit_on_error=False, print_error=False)


def test_kuberays_own_schema_takes_the_job() -> None:
    schema = json.loads((ROOT / "tests/schemas/rayjob_v1.json").read_text())
    jsonschema.Draft4Validator(schema).validate(JOB["spec"])
    assert (JOB["apiVersion"], JOB["kind"], STAGES["kind"]) == ("ray.io/v1", "RayJob", "ConfigMap")


def test_a_misspelt_field_of_the_job_is_seen() -> None:
    schema = json.loads((ROOT / "tests/schemas/rayjob_v1.json").read_text())
    wrong = {**JOB["spec"], "rayClusterSpecs": {}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(schema).validate(wrong)


def test_the_job_runs_both_stages_with_flags_that_there_are() -> None:
    script = STAGES["data"]["stages.sh"]
    lines = [line for line in script.replace("\\\n", " ").splitlines() if line.startswith("pipeline ")]
    assert [shlex.split(line)[1] for line in lines] == ["teacher-logits", "train-student"]
    for line in lines:
        check_flags(shlex.split(line))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    mounted = JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert JOB["spec"]["entrypoint"] == f"bash {mounted[0]['mountPath']}/stages.sh"


def test_the_cluster_has_the_images_ray_a_password_and_pools_that_the_flags_fill() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pools = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    limits = pools["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    script = STAGES["data"]["stages.sh"]
    assert f"--actors {pools['gpu']['maxReplicas']} --gpus-per-actor 1" in script
    assert f"--ranks {pools['gpu']['maxReplicas']} --device cuda" in script
    assert "cpu" in pools


def test_whoever_stops_a_job_gives_it_time_to_save() -> None:
    assert int(yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"][STOP_SECONDS]) >= 60
    entrypoint = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["teacher-logits"]["entrypoint"]
    [given] = [word.partition("=")[2] for word in entrypoint if word.startswith("--runtime-env-json=")]
    assert int(json.loads(given)["env_vars"][STOP_SECONDS]) >= 60
    page = (ROOT / "docs/clusters.md").read_text()
    submissions = page.replace("\\\n", " ").split("ray job submit")[1:]
    assert any(f'"{STOP_SECONDS}": "300"' in text for text in submissions)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes with four GPUs each; what SLURM, Ray and we would do is written down."""
    (tmp_path / "bin").mkdir()
    programs = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || printf "node1\\nnode2\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do case $1 in --overlap) shift;; *) shift 2;; esac; done; exec "$@"',
        "hostname": "echo 192.0.2.1",
        "ray": 'echo "ray $* ${RAY_ADDRESS-}" >> "$CALLS"',
        "pipeline": 'echo "pipeline $*" >> "$CALLS"; [ "$1" != "${STUCK-}" ] || { trap "exit 143" TERM; '
        "while :; do sleep 0.1; done; }",
    }
    for name, does in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[1-2]", "CPUS_PER_TASK": "32", "GPUS_ON_NODE": "4"}
    ours = {"DATA": "/d", "EVAL_DATA": "/e", "STORE": "/s", "RUN": "/r", "TEACHERS": "passt_s ast_base@2"}
    here = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "ENVIRONMENT": ""}
    return {**os.environ, **here, **{f"SLURM_{name}": value for name, value in job.items()}, **ours}


def calls(slurm: dict[str, str]) -> list[str]:
    path = Path(slurm["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("page", [ROOT / "docs/clusters.md", SBATCH], ids=["docs", "its head"])
def test_what_is_typed_before_sbatch_is_what_the_script_reads(page: Path) -> None:
    typed = re.findall(r"^(?:# +)?(DATA=.*)\\\n.*sbatch ", page.read_text(), re.MULTILINE)
    assert typed
    for name in re.findall(r"(\w+)=", " ".join(typed)):
        assert re.search(rf"\$\{{?{name}\b", SBATCH.read_text()), name


def test_sbatch_starts_ray_on_all_nodes_and_then_both_stages(slurm: dict[str, str]) -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    subprocess.run(["bash", str(SBATCH)], env=slurm, check=True, timeout=30)
    while sum(line.startswith("ray start") for line in calls(slurm)) < 2:
        time.sleep(0.05)  # they are started side by side
    called = calls(slurm)
    options = "--block --disable-usage-stats --num-cpus 32 --object-store-memory 268435456 "
    assert f"ray start --head --node-ip-address 192.0.2.1 --port 20007 {options}" in called
    assert f"ray start --address 192.0.2.1:20007 {options}" in called
    stages = [line for line in called if line.startswith("pipeline")]
    assert [line.split()[1] for line in stages] == ["teacher-logits", "train-student"]
    assert "--actors 8 --gpus-per-actor 1 --data /d --teacher passt_s ast_base@2 --store /s" in stages[0]
    assert "--ranks 8 --resume --data /d --store /s --eval-data /e --model mn10 --run /r" in stages[1]
    for line in stages:
        check_flags(line.split())


def test_sbatch_without_gpus_has_an_actor_and_a_rank_a_node(slurm: dict[str, str]) -> None:
    del slurm["SLURM_GPUS_ON_NODE"]
    subprocess.run(["bash", str(SBATCH)], env=slurm, check=True, timeout=30)
    stages = [line for line in calls(slurm) if line.startswith("pipeline")]
    assert "--actors 2 --data" in stages[0]
    assert "--ranks 2 " in stages[1]


def test_sbatch_ends_with_a_stage_that_fails(slurm: dict[str, str]) -> None:
    Path(slurm["CALLS"]).parent.joinpath("bin/pipeline").write_text(
        '#!/bin/sh\necho "pipeline $*" >> "$CALLS"; exit 3\n'
    )
    assert subprocess.run(["bash", str(SBATCH)], env=slurm, check=False, timeout=30).returncode == 3
    assert sum(line.startswith("pipeline") for line in calls(slurm)) == 1
    assert not any("requeue" in line for line in calls(slurm))


def test_a_job_whose_time_is_over_lets_its_stage_save_and_is_queued_again(slurm: dict[str, str]) -> None:
    with subprocess.Popen(["bash", str(SBATCH)], env={**slurm, "STUCK": "train-student"}) as job:
        while not any("train-student" in line for line in calls(slurm)):
            assert job.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 143
    assert calls(slurm)[-1] == "scontrol requeue 7"


def test_sbatch_names_what_is_missing(slurm: dict[str, str]) -> None:
    del slurm["STORE"]
    done = subprocess.run(["bash", str(SBATCH)], env=slurm, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "STORE: the logit store" in done.stderr
