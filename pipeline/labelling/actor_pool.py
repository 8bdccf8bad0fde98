"""A pool of Ray actors that label shards: Ray Data starts them and restarts what dies; they fetch orders from a board.

With `work_board`, the room's only module that imports Ray, so a machine without it can still label shards one by one.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from pipeline import redaction
from pipeline.errors import LostProcessError, PipelineError, StorageFullError, StorageUnavailableError
from pipeline.labelling.actor_layout import Layout, fit_to_machines, own_share
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.publisher import Publisher
from pipeline.labelling.shard_decoder import Following
from pipeline.labelling.shard_labeller import BATCH_SIZES, LabelledRange, LabellerConfig, ShardLabeller, ShardReport
from pipeline.labelling.work_board import BoardHandle, Event, exchange
from pipeline.labelling.work_plan import Order, ShardOutcome, Step, StepOutcome, WorkPlan, steps_and_followers
from pipeline.models.device import still_works
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.ray_capacity import TOLD_SECONDS, RoomWatch, machines
from pipeline.runtime.ray_pulse import PulseWatch, beating
from pipeline.runtime.same_code import check_versions, versions
from pipeline.runtime.watching import Watch
from pipeline.storage.outages import outlast

_SILENT_SECONDS = 30.0
"""After so long without a sign of life of whoever works at an order it is given to another actor, too."""
_COMPILED_CLIPS = 300_000
"""So many clips an actor pay for half a minute of compiling on a GPU: PaSST-S gains 0.1 ms a clip on an H100."""
_LOOK_SECONDS = 0.2
_IDLE_SECONDS = 0.3
_REST_SECONDS = 2.0
_END_SECONDS = 10.0
"""How long the actors may take to end once all is done."""

_log = logging.getLogger(__name__)


def label_shards(
    config: LabellerConfig,
    shards: Mapping[str, int],
    *,
    done: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    actors: tuple[int, int] | None = None,
    cpus_per_actor: int | None = None,
    gpus_per_actor: float | None = None,
    on_clips: Callable[[int], None],
) -> Generator[ShardOutcome, None, None]:
    """Label shards on the running Ray; outcomes come as they are ready, one for each shard. Close it before Ray ends.

    Args:
        config: what the actors do; their device follows from the GPUs that they claim.
        shards: their names in the manifest, and how many clips each has.
        done: stretches of them, (start, stop), that were labelled before.
        actors: how many at least and at most; None is one for each GPU, or for each machine.
        cpus_per_actor: cores that each claims and computes with; None is an even share of those of the machines that
            can host an actor.
        gpus_per_actor: GPUs that each claims; None is 1 where there are any.
        on_clips: told from time to time, from another thread, how many more clips are done.

    Raises:
        LostProcessError: nobody has given a sign of life for `config.patience`.
        PipelineError: Ray itself fails, such as when the cluster goes away.
    """
    layout = fit_to_machines(machines(), actors, cpus_per_actor, gpus_per_actor)
    device = "cuda" if layout.gpus_per_actor else "cpu"
    compiled = config.compile
    if compiled is None:
        left = sum(shards.values()) - sum(stop - start for pieces in (done or {}).values() for start, stop in pieces)
        compiled = device == "cuda" and left >= _COMPILED_CLIPS * layout.max_actors
    config = replace(config, device=device, batch_size=config.batch_size or BATCH_SIZES[device], compile=compiled)
    plan = WorkPlan(shards, actors=layout.max_actors, batch_size=config.batch_size, done=done)
    board = BoardHandle.open()
    foreman = _Foreman(plan, board, layout, min(_SILENT_SECONDS, config.patience), on_clips)
    try:
        with PulseWatch(board, config.patience, on_look=foreman.look) as watch:
            pool = _start_pool(config, layout, board)
            while not foreman.finished and not pool.done():
                yield from foreman.take_ended()
                watch.check()
                foreman.check()
                time.sleep(_LOOK_SECONDS)
        # The watch has looked once more: what actors said before they ended tells why they did.
        yield from foreman.take_ended()
        if not foreman.finished:
            foreman.check()
            _raise_what_ended(pool)
        board.tell("stop")
        _wait_for_end(pool)
    finally:
        board.tell("stop")  # whatever ends the run, no actor begins another shard


def _start_pool(config: LabellerConfig, layout: Layout, board: BoardHandle) -> "Future[None]":
    """Let Ray Data run the actors, in a thread; each works at a row until nothing is left to do."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A row takes as long as the run: who does nothing is found by the signs of life, who finds no room by `RoomWatch`.
    context.execution_no_progress_timeout_s = -1
    # An actor has one row at a time, so it is never busier than that: this lets the pool grow up to its largest size.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    logger = logging.getLogger("ray.data")
    # Its log file, in Ray's session folder, keeps everything.
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, logging.StreamHandler)]
    workers = [{"worker": number} for number in range(layout.max_actors)]
    rows = ray.data.from_items(workers, override_num_blocks=len(workers)).map_batches(
        _LabelActor,
        fn_constructor_args=(config, layout, board, versions()),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=layout.actors, max_size=layout.max_actors, max_tasks_in_flight_per_actor=1),
        num_cpus=layout.cpus_per_actor,
        num_gpus=layout.gpus_per_actor,
    )
    ended: Future[None] = Future()

    def consume() -> None:
        try:
            for _ in rows.iter_rows():
                pass
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=consume, name="Ray Data", daemon=True).start()
    return ended


def _raise_what_ended(pool: "Future[None]") -> None:
    error = pool.exception()
    if isinstance(error, RayError):
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. The same command goes on with what is missing.") from error
    if error is not None:
        raise error
    raise PipelineError("Ray ended before all was done. The same command goes on with what is missing.")


def _wait_for_end(pool: "Future[None]") -> None:
    """Wait for actors to end by themselves; those that are lost, or wait for room, are left to the end of Ray."""
    end = time.monotonic() + _END_SECONDS
    while not pool.done() and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)


class _Foreman:
    """Keeps the plan and the board in step: `look` in the thread of the watch, the rest from any thread."""

    def __init__(
        self, plan: WorkPlan, board: BoardHandle, layout: Layout, silence: float, on_clips: Callable[[int], None]
    ) -> None:
        self._plan, self._board = plan, board
        self._silence, self._on_clips = silence, on_clips
        claims = {"GPU": layout.gpus_per_actor, "CPU": layout.cpus_per_actor}
        self._room = RoomWatch("MapWorker", layout.actors, claims)
        self._planning = threading.Lock()
        self._waiting: dict[int, Order] = {}
        """Orders that nobody has fetched, as far as is known."""
        self._fetched: dict[int, Watch] = {}
        self._read = ("", 0)
        self._shown = plan.clips_done
        self._told: dict[str, float] = {}
        self._error: Exception | None = None
        self._workers = layout.max_actors
        self._unfit: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        with self._planning:
            return self._plan.finished

    def take_ended(self) -> list[ShardOutcome]:
        """Returns the shards that have ended since the last call."""
        with self._planning:
            return self._plan.take_ended()

    def check(self) -> None:
        """Raise what went wrong in `look`, which nobody waits for."""
        if self._error is not None:
            raise self._error

    def look(self) -> None:
        """Read what is new on the board, and leave orders there."""
        try:
            self._look()
        except Exception as error:
            self._error = error

    def _look(self) -> None:
        with self._planning:
            while len(self._waiting) < max(1, len(self._fetched)) and (order := self._plan.take()):
                self._waiting[order.number] = order
        state = exchange(self._board, list(self._waiting.values()), *self._read)
        if state is None:
            return
        self._read = state.generation, state.last_event
        with self._planning:
            for number in self._waiting.keys() - state.waiting:
                del self._waiting[number]
                self._fetched[number] = Watch(self._silence)
            for event in state.events:
                self._note(event)
            self._release_what_is_silent(state.signs)
            done = self._plan.clips_done + sum(state.clips.get(number, 0) for number in self._fetched)
            finished = self._plan.finished
        self._on_clips(done - self._shown)
        self._shown = done
        self._room.look(enough=finished)

    def _note(self, event: Event) -> None:
        match event.what:
            case "step":
                self._plan.step_ended(event.order, event.about)
            case "ended":
                self._plan.order_ended(event.order)
                self._fetched.pop(event.order, None)
            case "lost":
                self._plan.order_lost(event.order)
                self._fetched.pop(event.order, None)
            case "unfit":
                self._plan.order_ended(event.order)
                self._fetched.pop(event.order, None)
                self._leave_out(*event.about)
            case "told" if time.monotonic() > self._told.get(event.about, 0):
                self._told[event.about] = time.monotonic() + TOLD_SECONDS
                _log.warning("%s", event.about)

    def _leave_out(self, worker: int, machine: str, why: str) -> None:
        """Do without a worker that can't load the teachers; without all of them nothing can be done."""
        self._unfit.add(worker)
        if len(self._unfit) == self._workers:
            self._error = PipelineError(why)
        else:
            _log.warning("%s is left out: it can't load the teachers, tried twice: %s", machine, why)

    def _release_what_is_silent(self, signs: Mapping[str, object]) -> None:
        """Give to others what somebody works at who may be gone, with his machine; if he is not, no harm is done."""
        for number, watch in list(self._fetched.items()):
            step = self._plan.step_of(number)
            watch.see((step, signs.get(str(step))))
            if watch.expired:
                self._plan.order_ended(number)
                del self._fetched[number]


class _LabelActor:
    """Loads the teachers with the first order, so that a failure comes back as an outcome, not as a dead actor."""

    def __init__(
        self, config: LabellerConfig, layout: Layout, board: BoardHandle, of_driver: Mapping[str, str]
    ) -> None:
        redaction.install()  # Ray keeps what an actor logs
        self._config, self._board, self._versions = config, board, of_driver
        self._cpus = own_share(_this_machine(), layout)
        self._machine = platform.node()
        self._labeller: ShardLabeller | None = None
        self._failure = ""
        """Why the teachers can't be loaded here."""
        self._worked_until: float | None = None
        self._ahead: Order | None = None
        """Fetched while the order before was at its end."""
        self._ahead_beats = ExitStack()
        """Signs of life of whoever has it in hand."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Carry out orders until nothing is left to do."""
        worker, publisher = int(batch["worker"].item()), Publisher()
        self._ask("hello", worker)
        # Between two stretches, too, it may stand still.
        with beating(self._board, f"worker {worker}", publisher.sign), publisher:
            self._work(worker, publisher)
        return {"worker": [worker]}

    def _work(self, worker: int, publisher: Publisher) -> None:
        goes_on = True
        while goes_on:
            goes_on, order = self._take(worker)
            if order is not None and not self._load(str(order.steps[0])):
                self._ask("unfit", worker, order.number, self._machine, self._failure)
                self._wait_for_end()
                break
            if order is not None:
                self._carry_out(worker, order, publisher)
            elif goes_on:
                time.sleep(_IDLE_SECONDS)

    def _wait_for_end(self) -> None:
        """Wait until the others have done: whoever is free would get the rows of actors that are still to start."""
        while self._ask("goes_on"):
            time.sleep(_REST_SECONDS)

    def _take(self, worker: int) -> tuple[bool, Order | None]:
        order, self._ahead = self._ahead, None
        self._ahead_beats.close()
        return self._ask("fetch", worker) if order is None else (True, order)

    def _fetch_ahead(self, worker: int) -> ClipRange | None:
        """Fetch the next order, if there is one at once, and return what it begins with, to be decoded meanwhile."""
        if self._ahead is None:
            with suppress(RayError, ValueError):  # it is asked again in time
                _, self._ahead = self._board.ask("fetch", worker, True)
            if self._ahead is not None:
                self._ahead_beats.enter_context(beating(self._board, str(self._ahead.steps[0])))
        first = None if self._ahead is None else self._ahead.steps[0]
        return first if isinstance(first, ClipRange) else None

    def _load(self, step: str) -> bool:
        """Load the teachers where that was not done yet, in two tries; False where they can't be loaded here."""
        if self._labeller is None and not self._failure:
            torch.set_num_threads(self._cpus)
            if self._config.device == "cpu":
                keep_freed_memory()  # 12 % less CPU time a clip, measured with the tiny teachers
            with beating(self._board, step):
                self._labeller = self._try_to_load() or self._try_to_load()
        return self._labeller is not None

    def _try_to_load(self) -> ShardLabeller | None:
        try:
            check_versions(self._versions)
            return outlast(lambda: ShardLabeller(self._config), self._config.patience, self._tell_outage)
        except Exception as error:
            _log.exception("loading the teachers")
            self._failure = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
            return None

    def _ask(self, method: str, *given: object) -> Any:
        return self._board.ask(method, *given, patience=self._config.patience)

    def _carry_out(self, worker: int, order: Order, publisher: Publisher) -> None:
        """Make what is asked for; the last step, and perhaps the end, are still to be published then."""
        end = time.monotonic() + order.seconds
        for step, following in steps_and_followers(order.steps):
            # Nobody knows what comes next before the last step; there it is fetched as late as may be.
            next_one = partial(self._fetch_ahead, worker) if step is order.steps[-1] else following
            with beating(self._board, str(step), publisher.sign):
                idle = 0.0 if self._worked_until is None else time.monotonic() - self._worked_until
                made = self._make(order, step, next_one)
                self._worked_until = time.monotonic()
                before = publisher.wait()
            finish = partial(self._finish, step, made, idle, publisher)
            publisher.submit(f"publishing {step}", partial(self._tell_outcome, worker, order, step, finish))
            failed = [one for one in (before, made) if isinstance(one, StepOutcome)]
            if any(one.ends_run for one in failed) or time.monotonic() > end:
                break
        publisher.submit(f"the end of order {order.number}", partial(self._ask, "ended", worker, order.number))

    def _make(self, order: Order, step: Step, following: Following | ClipRange | None) -> "_Made":
        """Make a step's logits; again where a process that decodes is lost, and while the storage is away."""
        if isinstance(step, ShardJoin):
            return step
        lost: list[str] = []
        while True:
            try:
                # What was lost may have been lost over what follows: a second try does without it.
                next_one = None if lost else following
                made = outlast(lambda: self._compute(order, step, next_one), self._config.patience, self._tell_outage)  # noqa: B023
            except LostProcessError as error:
                lost.append(str(error))
                if len(lost) < order.tries:
                    continue
                return StepOutcome(shard=step.shard, start=step.start, error=lost[-1])
            except Exception as error:
                return self._failed(step, error)
            return made, f"{step.shard} was begun again: {lost[-1]}" if lost else ""

    def _compute(self, order: Order, step: ClipRange, following: Following | ClipRange | None) -> LabelledRange:
        assert self._labeller is not None
        end = time.monotonic() + order.seconds
        return self._labeller.compute(
            step,
            partial(self._board.tell, "set_done", order.number, step.shard, step.start),
            following=following,
            enough=lambda: time.monotonic() > end,
        )

    def _tell_outcome(self, worker: int, order: Order, step: Step, finish: Callable[[], StepOutcome]) -> StepOutcome:
        with beating(self._board, str(step)):
            outcome = finish()
            self._ask("step", worker, order.number, outcome)
        return outcome

    def _finish(self, step: Step, made: "_Made", idle: float, publisher: Publisher) -> StepOutcome:
        """Publish what was made, again while the storage is away; in the publisher's thread."""
        if isinstance(made, StepOutcome):
            return made
        try:
            report = outlast(lambda: self._publish(made), self._config.patience, self._tell_outage)
        except Exception as error:
            return self._failed(step, error)
        held_up = publisher.held_up_seconds
        return StepOutcome(
            shard=report.shard,
            start=report.start,
            stop=report.stop,
            failed=report.failed,
            published=report.published,
            seconds=report.seconds - report.publishing_seconds + held_up,
            waiting_seconds=report.waiting_seconds,
            copying_seconds=report.copying_seconds,
            publishing_seconds=held_up,
            idle_seconds=idle,
            warning="" if isinstance(made, ShardJoin) else made[1],
        )

    def _publish(self, made: "tuple[LabelledRange, str] | ShardJoin") -> ShardReport:
        assert self._labeller is not None
        return self._labeller.join_shard(made) if isinstance(made, ShardJoin) else self._labeller.publish(made[0])

    def _failed(self, step: Step, error: Exception) -> StepOutcome:
        # Ray would end the whole run. Whatever went wrong with this shard, the others can still be done.
        _log.exception("%s", step)
        message = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        if not still_works(self._config.device):
            self._end_process(message)
        start = step.start if isinstance(step, ClipRange) else 0
        return StepOutcome(shard=step.shard, start=start, error=message, ends_run=isinstance(error, StorageFullError))

    def _end_process(self, message: str) -> None:
        """End this process, whose GPU answers nothing any more, so that Ray starts it anew, perhaps elsewhere."""
        reason = message.splitlines()[0]
        with suppress(RayError):
            self._ask("tell", f"{self._machine}: its GPU has failed ({reason}); a new process begins the shard again")
        os._exit(1)

    def _tell_outage(self, error: StorageUnavailableError) -> None:
        self._board.tell("tell", f"{error}; waiting up to {self._config.patience:g} s for it")


_Made = tuple[LabelledRange, str] | ShardJoin | StepOutcome
"""Logits and a warning, what is only to be published, or what went wrong."""


def _this_machine() -> Mapping[str, float]:
    here = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
