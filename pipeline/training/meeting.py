"""Ranks that meet at a store which an earlier start of theirs has used: what lies there is not to be taken for news.

torchrun keeps one store for all starts of a launch, in which addresses and signs of life of dead ranks would be found.
"""

import hashlib
import os
import secrets
import time

import torch.distributed as dist

_LOOK_SECONDS = 0.05


def is_kept_between_starts() -> bool:
    """Whether the launcher's store outlives a start of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_start(store: dist.Store, rank: int, world_size: int, seconds: float) -> dist.Store:
    """Returns a part of a store in which nothing lies yet, the same to all ranks of this start and to no other's.

    Each rank shows a number that nobody had before; the first one calls them out until each has answered for its own.
    So none can be taken for its predecessor.

    Args:
        store: the launcher's.
        rank: this one's number.
        world_size: how many there are.
        seconds: how long to wait for all of them.

    Raises:
        RuntimeError: they did not all come; it says that it timed out.
    """
    end, ours = time.monotonic() + seconds, secrets.token_hex(8)
    store.set(f"start/here/{rank}", ours)
    answered = ""
    while time.monotonic() < end:
        if rank == 0:
            called = ",".join(_read(store, f"start/here/{other}") for other in range(world_size))
            store.set("start/called", called)
            if all(_read(store, f"start/answer/{other}") == called for other in range(1, world_size)):
                store.set("start/agreed", called)
                return _part(store, called)
        else:
            called = _read(store, "start/called")
            if called != answered and called.split(",")[rank : rank + 1] == [ours]:
                store.set(f"start/answer/{rank}", called)
                answered = called
            if answered and _read(store, "start/agreed") == answered:
                return _part(store, answered)
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError(f"timed out after {seconds:g} s, in which not all ranks came")


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _part(store: dist.Store, agreed: str) -> dist.Store:
    return dist.PrefixStore(f"start/{hashlib.sha256(agreed.encode()).hexdigest()[:16]}", store)
