"""What handing out shards costs, measured with labellers that do nothing: nothing may grow faster than the shards.

    python -m benchmarks.cluster_scale --shards 2000 20000 --alone 20000 200000

`--shards` has them labelled by actors on a Ray of this machine, each number in a process of its own; `--alone` lets the
driver's plan, its foreman and the board work in one process without Ray, whose own part is then the difference. The
first row of each kind is the baseline of its ratio: a shard's share of the driver should not rise from row to row.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any, cast

import psutil
import ray

from pipeline.labelling import actor_pool, work_board
from pipeline.labelling.actor_layout import Layout
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.label_actor import LabelActor
from pipeline.labelling.shard_decoder import Following
from pipeline.labelling.shard_labeller import LabelledRange, LabellerConfig, ShardReport
from pipeline.labelling.work_board import WorkBoard
from pipeline.labelling.work_plan import Order, StepOutcome, WorkPlan
from pipeline.logits.stamp import StoreStamp
from pipeline.runtime.ray_session import running_ray

CLIPS = 32
"""Of a shard: few, so that an order holds 200 of them, and the driver's looks, twice a second, are no limit."""
BATCH_SIZE = 64
ACTORS = 2
MESSAGES = ("beat", "rest", "pulse", "hello", "fetch", "step", "ended", "set_done", "exchange")


class IdleActor(LabelActor):
    """Says at once that all is done."""

    def _load(self, step: str) -> bool:
        return True

    def _compute(self, order: Order, step: ClipRange, following: Following | ClipRange | None) -> LabelledRange:
        if callable(following):
            following()  # the next order is fetched
        nothing = {"rows": [], "logits": [], "failures": {}, "waiting_seconds": 0.0, "copying_seconds": 0.0}
        return LabelledRange(shard=step.shard, start=0, stop=CLIPS, is_whole=True, seconds=0.001, **nothing)

    def _publish(self, made: tuple[LabelledRange, str] | ShardJoin) -> ShardReport:
        shard = made.shard if isinstance(made, ShardJoin) else made[0].shard
        return ShardReport(shard=shard, start=0, stop=CLIPS, published=True, clips=CLIPS, failed=0, seconds=0.001)


class CountingBoard(WorkBoard):
    """Knows how many messages came."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def messages(self) -> int:
        """Returns how many there were."""
        return self.count


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: CountingBoard, *given: object) -> object:
        self.count += 1
        return method(self, *given)

    return call


for _name in MESSAGES:
    setattr(CountingBoard, _name, _counted(getattr(WorkBoard, _name)))


class LocalBoard:
    """The way to a board in this process."""

    def __init__(self) -> None:
        self.board = CountingBoard()

    def ask(self, method: str, *given: object, patience: float = 0.0) -> object:
        """Returns the board's answer."""
        return getattr(self.board, method)(*given)


class Cost:
    """What the block took of this process: seconds of processor time and, at its peak, bytes of memory."""

    def __enter__(self) -> "Cost":
        self._memory = psutil.Process().memory_info().rss
        self._peak, self._ended = self._memory, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._cpu, self._started = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = time.process_time() - self._cpu
        self._ended.set()
        self._thread.join(5)
        self._look()
        self.bytes = self._peak - self._memory

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, psutil.Process().memory_info().rss)


def on_ray(shards: int) -> dict[str, float]:
    """Hand out so many shards to actors; returns what it took."""
    actor_pool.LabelActor = IdleActor
    work_board.WorkBoard = CountingBoard
    stamp = StoreStamp(teachers=(), vocabulary_sha256="", classes=1, precision="float32")
    config = LabellerConfig(data="", store="", teachers=(), stamp=stamp, batch_size=BATCH_SIZE)
    with running_ray(None):
        first, ended = 0.0, 0
        actors = min(ACTORS, int(ray.cluster_resources()["CPU"]))
        with Cost() as cost:
            for _ in actor_pool.label_shards(
                config, _named(shards), actors=(actors, actors), cpus_per_actor=1, on_clips=lambda clips: None
            ):
                first = first or time.perf_counter()
                ended += 1
            seconds = time.perf_counter() - first  # without the actors' start
        assert ended == shards
        [name] = [name for name in ray.util.list_named_actors() if name.startswith("work-")]
        messages = cast("int", ray.get(ray.get_actor(name).messages.remote(), timeout=60))
    return _row(shards, seconds, cost, messages)


def alone(shards: int) -> dict[str, float]:
    """Hand out so many shards within this process; returns what it took."""
    board = LocalBoard()
    with Cost() as cost:
        plan = WorkPlan(_named(shards), actors=ACTORS, batch_size=BATCH_SIZE)
        layout = Layout(ACTORS, ACTORS, cpus_per_actor=1, gpus_per_actor=0, own_share=False)
        foreman = actor_pool._Foreman(plan, cast("Any", board), layout, 30.0, lambda clips: None)
        foreman._room = cast("Any", SimpleNamespace(look=lambda enough: None))  # there is no Ray to ask
        ended = 0
        while not foreman.finished:
            foreman.look()
            foreman.check()
            for worker in range(ACTORS):
                _work(board, worker)
            ended += len(foreman.take_ended())
        ended += len(foreman.take_ended())
    assert ended == shards
    return _row(shards, cost.seconds, cost, board.board.count)


def _work(board: LocalBoard, worker: int) -> None:
    """Do as an actor does with one order, signs of life included."""
    _, order = cast("tuple[bool, Order | None]", board.ask("fetch", worker))
    if order is None:
        return
    for step in order.steps:
        board.ask("beat", str(step), 0)
        outcome = StepOutcome(shard=step.shard, start=0, stop=CLIPS, published=True, seconds=0.001)
        board.ask("rest", str(step))
        board.ask("step", worker, order.number, outcome)
    board.ask("ended", worker, order.number)


def _named(shards: int) -> dict[str, int]:
    return {f"shard-{number:07d}.tar": CLIPS for number in range(shards)}


def _row(shards: int, seconds: float, cost: Cost, messages: int) -> dict[str, float]:
    return {
        "shards": shards,
        "seconds": seconds,
        "cpu_seconds": cost.cpu_seconds,
        "bytes": cost.bytes,
        "messages": messages,
    }


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[])
    parser.add_argument("--alone", type=int, nargs="*", default=[])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, shards = options.child
        print(json.dumps((on_ray if kind == "on Ray" else alone)(int(shards))))
        return
    print("| | shards | seconds | shards/s | driver CPU, s | ms a shard | × | driver memory, MB | KB a shard |", end="")
    print(" messages | a shard | messages/s |")
    print("|---|" + "---:|" * 11)
    for kind, numbers in (("on Ray", options.shards), ("alone", options.alone)):
        baseline: dict[str, float] = {}
        for shards in numbers:
            command = [sys.executable, "-m", "benchmarks.cluster_scale", "--child", kind, str(shards)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            baseline = baseline or found
            print(_line(kind, found, baseline), flush=True)


def _line(kind: str, found: dict[str, float], baseline: dict[str, float]) -> str:
    shards = found["shards"]
    per_shard = {name: found[name] / shards for name in ("cpu_seconds", "bytes", "messages")}
    cells = (
        kind,
        f"{shards:,}",
        f"{found['seconds']:.1f}",
        f"{shards / found['seconds']:,.0f}",
        f"{found['cpu_seconds']:.1f}",
        f"{1000 * per_shard['cpu_seconds']:.3f}",
        f"{per_shard['cpu_seconds'] / (baseline['cpu_seconds'] / baseline['shards']):.2f}",
        f"{found['bytes'] / 1e6:,.1f}",
        f"{per_shard['bytes'] / 1e3:.2f}",
        f"{found['messages']:,}",
        f"{per_shard['messages']:.2f}",
        f"{found['messages'] / found['seconds']:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
