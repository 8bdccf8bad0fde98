"""Threads that wait within Ray end before Ray does, whatever ends the command."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.runtime.ray_session import running_ray  # first: it sets what Ray reads while it is imported

# isort: split
import ray
import ray.data

from pipeline.runtime.ray_capacity import actors_of_this_job
from pipeline.runtime.ray_threads import waiting_in_ray

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def a_ray() -> Iterator[None]:
    ray.shutdown()  # of what an earlier test has left in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where Ray's processes find this module
        with running_ray(None):
            yield


@ray.remote(num_cpus=0)
class Sleeper:
    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


@ray.remote(num_cpus=0)
class Bystander:
    def answer(self) -> str:
        return "here"


class Still:
    """What Ray Data's actors do with a row: nothing, for longer than any test."""

    def __call__(self, rows: dict) -> dict:
        time.sleep(600)
        return rows


def wait_for_an_actor() -> None:
    ray.get(Sleeper.remote().sleep.remote(600))


def wait_for_a_pool() -> None:
    one = ray.data.ActorPoolStrategy(size=1)
    for _ in ray.data.from_items([{"row": 0}]).map_batches(Still, batch_size=1, compute=one).iter_rows():
        pass


def alive(class_name: str) -> int:
    return [actor["State"] for actor in actors_of_this_job(class_name)].count("ALIVE")


def interrupt_while(work: Callable[[], None], class_name: str) -> None:
    with waiting_in_ray(work, "waiting", actors=class_name) as done:
        while not alive(class_name):
            assert not done.done(), done.exception()
            time.sleep(0.05)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("work", "class_name"), [(wait_for_an_actor, "Sleeper"), (wait_for_a_pool, "MapWorker")])
def test_what_waits_in_ray_ends_with_the_block_and_nobody_else(work: Callable[[], None], class_name: str) -> None:
    before, bystander = set(threading.enumerate()), Bystander.remote()
    with pytest.raises(KeyboardInterrupt):
        interrupt_while(work, class_name)
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name != "end of waiting"]
    assert not left
    assert alive(class_name) == 0
    assert ray.get(bystander.answer.remote(), timeout=60) == "here"


def test_what_has_ended_is_left_alone() -> None:
    sleeper = Sleeper.remote()
    with waiting_in_ray(lambda: ray.get(sleeper.sleep.remote(0.0)), "waiting", actors="Sleeper") as done:
        assert done.result(timeout=60) is None
    assert ray.get(sleeper.sleep.remote(0.1), timeout=60) == 0.1
