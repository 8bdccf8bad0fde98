"""Fake trees of /proc and /sys as containers have them, and where this machine lets us, a real cgroup."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.runtime.cores import cpu_quota, limit_threads, usable_cores

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes can't be bound to cores")
V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct\n"
THREADS = """
import sys
from pipeline import cli
sys.argv = ["pipeline", "--version"]
try:
    cli.main()
except SystemExit:
    from pipeline.runtime.cores import usable_cores
    import pyarrow, torch
    print(usable_cores(), torch.get_num_threads(), pyarrow.cpu_count())
"""
OTHER_MOUNTS = """23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
"""


def _brings_gnu_openmp() -> bool:
    spec = find_spec("torch")
    return bool(spec and spec.origin and list((Path(spec.origin).parent / "lib").glob("libgomp*")))


def make_tree(root: Path, *, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER_MOUNTS + mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1_limit(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        pytest.param(
            "0::/\n", V2_MOUNT.format(top="/"), {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2, id="v2 container"
        ),
        pytest.param("0::/\n", V2_MOUNT.format(top="/"), {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None, id="v2 free"),
        pytest.param(
            "0::/a.slice/b.scope\n",
            V2_MOUNT.format(top="/"),
            {
                "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n",
            },
            1.5,
            id="v2 limit on a cgroup above",
        ),
        pytest.param(
            "0::/a.slice/b.scope\n",
            V2_MOUNT.format(top="/"),
            {
                "sys/fs/cgroup/a.slice/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "50000 50000\n",
                "sys/fs/cgroup/other.slice/cpu.max": "1000 100000\n",
            },
            1,
            id="v2 smallest on the way counts, others don't",
        ),
        pytest.param(
            "5:cpuset:/\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
            V1_MOUNT.format(top="/docker/abc"),
            v1_limit("sys/fs/cgroup/cpu,cpuacct", 250_000),
            2.5,
            id="v1 container that sees the host's paths",
        ),
        pytest.param(
            "3:cpu,cpuacct:/\n",
            V1_MOUNT.format(top="/"),
            v1_limit("sys/fs/cgroup/cpu,cpuacct", -1),
            None,
            id="v1 free",
        ),
        pytest.param(
            "3:cpu,cpuacct:/slurm/job_1\n0::/\n",
            V1_MOUNT.format(top="/") + V2_MOUNT.replace("cgroup rw", "cgroup/unified rw").format(top="/"),
            v1_limit("sys/fs/cgroup/cpu,cpuacct/slurm/job_1", 400_000)
            | v1_limit("sys/fs/cgroup/cpu,cpuacct/slurm", 300_000),
            3,
            id="both versions mounted, the limit in version 1",
        ),
        pytest.param("0::/../elsewhere\n", V2_MOUNT.format(top="/"), {}, None, id="a cgroup out of sight"),
        pytest.param("0::/\n", "", {}, None, id="no hierarchy mounted"),
    ],
)
def test_quota_is_the_smallest_on_the_way_up_in_either_version(
    cgroup: str, mounts: str, files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(make_tree(tmp_path, cgroup=cgroup, mounts=mounts, files=files)) == expected


def test_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [("10000 100000", 1), ("100000 100000", 1), ("110000 100000", 2)])
def test_part_of_a_core_counts_as_one(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.cores._bound_cores", lambda: 64)
    files = {"sys/fs/cgroup/cpu.max": quota}
    assert usable_cores(make_tree(tmp_path, cgroup="0::/\n", mounts=V2_MOUNT.format(top="/"), files=files)) == cores


@needs_affinity
def test_no_more_cores_than_the_process_is_bound_to() -> None:
    bound = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
    assert _python(bound + "from pipeline.runtime.cores import usable_cores; print(usable_cores())") == "1"


def test_platform_that_binds_no_process_counts_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("process_cpu_count", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores(tmp_path) == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


@pytest.fixture
def one_cpu_cgroup() -> Iterator[Path]:
    """A cgroup with 1 CPU of quota below this process's own; give the file that a process joins it with."""
    from pipeline.runtime import cores

    folders = list(cores._cpu_cgroups(Path("/")))
    made = next(
        (folder / f"cores-{os.getpid()}" for folder in folders if _limit(folder / f"cores-{os.getpid()}")), None
    )
    if made is None:
        pytest.skip("this machine lets nobody make a cgroup with a quota")
    yield made / "cgroup.procs"
    made.rmdir()


def _limit(folder: Path) -> bool:
    """Make a cgroup with a quota of one CPU; give whether it worked."""
    try:
        folder.mkdir()
    except OSError:
        return False
    for name, text in (("cpu.max", "100000 100000"), ("cpu.cfs_quota_us", "100000")):
        with suppress(OSError):
            if (folder / name).exists():
                (folder / name).write_text(text)
                return True
    folder.rmdir()
    return False


@pytest.mark.skipif(usable_cores() < 2, reason="one core is all there is")
def test_threads_of_a_command_keep_to_a_real_quota(one_cpu_cgroup: Path) -> None:
    join = f"import os; open({str(one_cpu_cgroup)!r}, 'w').write(str(os.getpid()))\n"
    assert _python(join + THREADS) == "1 1 1"
    assert _python(THREADS) != "1 1 1"


def test_number_of_threads_that_somebody_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import cores

    monkeypatch.setattr(cores, "cpu_quota", lambda root: 1.0)
    monkeypatch.setattr(cores, "_bound_cores", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"


SPIN = "from pipeline.runtime.cores import limit_threads; limit_threads(); import torch"


@pytest.mark.skipif(not _brings_gnu_openmp(), reason="this torch brings another OpenMP")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
    ids=["by itself", "somebody's count", "somebody's policy"],
)
def test_idle_threads_sleep_soon_unless_somebody_said_otherwise(given: dict[str, str], expected: str) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**unset, **given, "OMP_DISPLAY_ENV": "VERBOSE"}
    told = subprocess.run([sys.executable, "-c", SPIN], env=environment, capture_output=True, text=True, check=True)
    assert expected in told.stderr
    assert ("10000" in told.stderr) == (not given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "0"), ({"KMP_BLOCKTIME": "200"}, "200"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["by itself", "somebody's time", "somebody's policy"],
)
def test_other_libraries_of_openmp_sleep_soon_too(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    limit_threads()
    assert os.environ.get("KMP_BLOCKTIME") == expected


def _python(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
