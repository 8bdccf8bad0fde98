"""How many actors a cluster has room for, and what each claims of its machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_USED_SHARE = 0.9
"""So much of the cores is used at least, where larger actors would leave more of them idle."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Actors of one size, for machines of any."""

    actors: int
    """How many at least."""
    max_actors: int
    """How many at most; the pool grows up to that as there is room."""
    cpus_per_actor: float
    """Cores that each claims from Ray."""
    gpus_per_actor: float
    own_share: bool
    """Whether an actor computes with its machine's share of cores, which may be more than what it claims."""

    @property
    def threads(self) -> int:
        """How many cores an actor computes with at least."""
        return max(1, int(self.cpus_per_actor))


def fit_to_machines(
    machines: Sequence[Mapping[str, float]],
    actors: tuple[int, int] | None,
    cpus_per_actor: int | None,
    gpus_per_actor: float | None,
) -> Layout:
    """Divide the machines that can host an actor among actors.

    Args:
        machines: the resources of each, such as `{"CPU": 8, "GPU": 1}`.
        actors: how many at least and at most; None is one for each GPU, or without any as many of one size as fill the
            machines, one each where they are alike.
        cpus_per_actor: cores that each claims; None is an even share of the machines that can host one.
        gpus_per_actor: GPUs that each claims; None is 1 where there are any.
    """
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    needed = cpus_per_actor or 1
    if gpus_per_actor:
        hosts = [
            (int(machine["CPU"]), int(machine.get("GPU", 0) / gpus_per_actor))
            for machine in machines
            if machine.get("GPU", 0) >= gpus_per_actor and machine.get("CPU", 0) >= 1
        ]
        room = sum(slots if cpus_per_actor is None else min(slots, cpus // needed) for cpus, slots in hosts)
        share = min((cpus / slots for cpus, slots in hosts), default=1.0)
        if actors is not None and share >= 1:
            share = _largest_share(hosts, actors[0], at_least=int(share))
    else:
        cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= needed]
        hosts = [(cpus, cpus) for cpus in cores]
        share = _even_share(cores) if actors is None else _largest_share(hosts, actors[0], at_least=1)
        room = sum(cpus // (cpus_per_actor or share) for cpus in cores) if cpus_per_actor is None else len(cores)
    claim = cpus_per_actor or (share if share < 1 else int(share))
    fewest, most = actors or (max(1, room), max(1, room))
    return Layout(fewest, most, claim, gpus_per_actor, own_share=cpus_per_actor is None and gpus_per_actor > 0)


def own_share(machine: Mapping[str, float], layout: Layout) -> int:
    """Returns how many cores an actor on a machine computes with."""
    if not layout.own_share or not layout.gpus_per_actor:
        return layout.threads
    slots = int(machine.get("GPU", 0) / layout.gpus_per_actor)
    return max(layout.threads, int(machine.get("CPU", 0) / slots) if slots else 0)


def _even_share(cores: Sequence[int]) -> int:
    """Returns the largest number of cores an actor that leaves hardly any core idle."""
    for share in range(max(cores, default=1), 1, -1):
        if sum(cpus // share * share for cpus in cores) >= _USED_SHARE * sum(cores):
            return share
    return 1


def _largest_share(hosts: Sequence[tuple[int, int]], actors: int, *, at_least: int) -> int:
    """Returns how many cores each may have so that so many find room.

    Args:
        hosts: (cores, actors for which there are GPUs) of each machine.
        actors: how many.
        at_least: where there is no room for them anyway.
    """
    for share in range(max((cpus for cpus, _ in hosts), default=1), at_least, -1):
        if sum(min(slots, cpus // share) for cpus, slots in hosts) >= actors:
            return share
    return max(1, at_least)
