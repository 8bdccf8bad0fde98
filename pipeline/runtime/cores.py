"""How many cores this process may use: what every number of threads and processes follows."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Returns how many cores this process may keep busy, at least 1.

    That is the smaller of the cores that it is bound to (`taskset`, Slurm, a cpuset) and the CPU time that its
    container is given, rounded up: with a quota of 2 CPUs on a host of 64 cores, 64 threads would only be throttled.

    Args:
        root: where `/proc` and `/sys` lie.
    """
    quota = cpu_quota(root)
    return _bound_cores() if quota is None else max(1, min(_bound_cores(), math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns how many CPUs' worth of time the process's cgroup and those above it allow, or None for any number.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`), wherever they are mounted; both have None on
    systems without cgroups. See the kernel's cgroup-v2.rst, "CPU Interface Files", and sched-bwc.rst.

    Args:
        root: where `/proc` and `/sys` lie.
    """
    quotas = [quota for folder in _cpu_cgroups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def limit_threads() -> None:
    """Let the libraries that are loaded from now on start a thread for each usable core, no more, and wait asleep.

    OpenMP (torch), OpenBLAS (NumPy) and Arrow see by themselves which cores the process is bound to, and torch how
    many of these are more than hyperthreads; a container's quota they don't see. A number that somebody has set stays.
    """
    cores = usable_cores()
    if cores < _bound_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if not any(name in os.environ for name in _WAITING):
        os.environ[_WAITING[0]] = _SPIN_TURNS
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's OpenMP, which other builds of torch have


_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPIN_TURNS = "10000"
"""How long a thread of OpenMP (GNU's, which torch brings) looks for the next loop before it sleeps: some tens of
microseconds, which is more than lies between two operators. By itself it looks 300,000 times. Beside other work that
keeps a core from whoever is waited for, all the while: a step with two busy processes on two cores was seen to fall
from 20 to 0.7 clips/s."""


def _bound_cores() -> int:
    count = getattr(os, "process_cpu_count", None)  # from Python 3.13 on; `python -X cpu_count=…` is obeyed, too
    if count is None and hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return (count or os.cpu_count)() or 1


def _cpu_cgroups(root: Path) -> Iterator[Path]:
    """Go through the folders of the process's cgroup and of those above it, of every hierarchy that limits CPU time."""
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    # A line of the first is "number:controllers:path", and version 2 has no controllers. The second has the mount's
    # root in its hierarchy in field 3, where it is mounted in field 4, and the hierarchy's kind after a lone hyphen.
    paths = {controller: path for _, controllers, path in own for controller in controllers.split(",")}
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in paths or (controller and controller not in options.split(",")):
            continue
        mounted = root / fields[4].lstrip("/")
        path, top = Path(paths[controller]), Path(fields[3])
        below = path.relative_to(top) if path.is_relative_to(top) else Path()
        yield from (mounted / part for part in (below, *below.parents))


def _quota_of(folder: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
        except (OSError, ValueError):  # no such file: the hierarchy's root, or another version
            continue
        if quota.isdigit() and int(quota) > 0 and int(period) > 0:  # `max` and -1 are no limit
            return int(quota) / int(period)
    return None
