"""What a Ray cluster has, what is wanted of it, and whether there is room: so that nobody waits in silence."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray._private import state
from ray.exceptions import RayError

TOLD_SECONDS = 30.0
"""How often a line tells what is waited for, while there is no room for it."""
_KINDS = ("GPU", "CPU")
_MAX_KINDS = 4
"""Of machines, that are named in a line."""

_log = logging.getLogger(__name__)


def machines() -> list[Mapping[str, float]]:
    """Returns the resources, such as CPU and GPU, of each machine of the cluster that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_room_on_gpus(device: str) -> bool:
    """Whether what is to run on a device, cpu, cuda or auto, gets GPUs of the cluster."""
    return device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


class RoomWatch:
    """Tells, every so often, what is wanted and what the cluster has while not all actors are there.

    Args:
        class_name: of the actors, as Ray calls it.
        wanted: how many of them there are to be at least.
        resources: what each of them claims, such as `{"CPU": 4}`.
    """

    def __init__(self, class_name: str, wanted: int, resources: Mapping[str, float]) -> None:
        self._class_name, self._wanted, self._resources = class_name, wanted, resources
        self._crowded_since: float | None = None

    def look(self, enough: bool) -> None:
        """Look whether there is room; call it often.

        Args:
            enough: nothing is left to do for those that wait.
        """
        now = time.monotonic()
        if self._crowded_since is None or enough:
            self._crowded_since = now
        if now - self._crowded_since < TOLD_SECONDS:
            return
        self._crowded_since = now
        with suppress(RayError, RuntimeError, OSError):  # a cluster that does not answer is told of by others
            self._tell_if_crowded()

    def _tell_if_crowded(self) -> None:
        states = [actor["State"] for actor in actors_of_this_job(self._class_name)]
        if states.count("ALIVE") < self._wanted:
            _log.warning(
                "waiting for %d of %d actors, which are starting or find no room; each wants %s, and %s",
                self._wanted - states.count("ALIVE"),
                self._wanted,
                _in_words(self._resources),
                capacity_in_words(),
            )


def actors_of_this_job(class_name: str) -> list[Mapping[str, Any]]:
    """Returns what Ray knows of this job's actors, dead ones too, whose class's name begins with `class_name`."""
    job = ray.get_runtime_context().get_job_id()
    actors = [actor for actor in state.actors().values() if actor["JobID"] == job]
    return [actor for actor in actors if actor["ActorClassName"].startswith(class_name)]


def wait_with_a_word(
    results: Sequence[ray.ObjectRef], patience: float, until: str
) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
    """Wait for some tasks, telling every so often until when; returns the results that are there, and the rest.

    Args:
        results: of the tasks.
        patience: how long they may take, in seconds.
        until: what they do, for the line.
    """
    end = time.monotonic() + patience
    while True:
        seconds = max(0.0, min(TOLD_SECONDS, end - time.monotonic()))
        there, left = ray.wait(list(results), num_returns=len(results), timeout=seconds)
        if not left or time.monotonic() >= end:
            return there, left
        _log.warning("waiting until %d of %d %s; %s", len(left), len(results), until, capacity_in_words())


def capacity_in_words() -> str:
    """Returns what the cluster has and what of it is free, in words."""
    kinds = Counter(filter(None, map(_in_words, machines())))
    if not kinds:
        return "the cluster has no machine with a CPU or GPU for Ray yet"
    there = ", ".join(f"{count} with {words}" for words, count in kinds.most_common(_MAX_KINDS))
    free = _in_words(ray.available_resources()) or "nothing"
    return f"the cluster has machines: {there}{', …' if len(kinds) > _MAX_KINDS else ''}; free is {free}"


def _in_words(resources: Mapping[str, float]) -> str:
    amounts = [(resources.get(kind, 0), kind) for kind in _KINDS]
    return " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for amount, kind in amounts if amount)
