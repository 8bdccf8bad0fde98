"""Threads that wait within Ray: each ends before Ray does, whose memory would go from under it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray._private import worker as ray_worker

from pipeline.runtime.ray_capacity import actors_of_this_job

_END_SECONDS = 10.0
"""How long a thread may take to end; one that waits for a cluster that does not answer is left where it is."""
_LOOK_SECONDS = 0.2


@contextmanager
def waiting_in_ray(work: Callable[[], object], name: str, *, actors: str) -> Iterator[Future[None]]:
    """Run in a thread what waits in Ray's own code, where no exception reaches it; the thread ends with the block.

    Args:
        work: what waits.
        name: of the thread.
        actors: what the names of the classes of the actors begin with that it waits for. Where it still waits when the
            block ends, they are killed, so that there is nothing left to wait for.

    Yields:
        Done when `work` is, with what it raised.
    """
    done: Future[None] = Future()

    def wait() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=wait, name=name, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        if not done.done():  # looked at in a thread of its own, for a cluster that is gone does not answer
            threading.Thread(target=_kill, args=(actors, thread), name=f"end of {name}", daemon=True).start()
        thread.join(_END_SECONDS)


def _kill(class_name: str, thread: threading.Thread) -> None:
    """Kill actors, and those that take their place, while a thread waits for them, but not for longer than it may."""
    end = time.monotonic() + _END_SECONDS
    while thread.is_alive() and time.monotonic() < end:
        with suppress(Exception):  # of a Ray that has ended by now, or does not answer
            core: Any = ray_worker.global_worker.core_worker  # pyright: ignore[reportAttributeAccessIssue]
            for actor in actors_of_this_job(class_name):
                if actor["State"] != "DEAD":
                    core.kill_actor(ray.ActorID.from_hex(actor["ActorID"]), True)
        thread.join(_LOOK_SECONDS)
