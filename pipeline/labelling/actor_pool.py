"""A pool of Ray actors that label shards: Ray Data starts them and restarts what dies; they fetch orders from a board.

With `label_actor` and `work_board` all of this room that imports Ray: without it shards can be labelled one by one.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from pipeline.errors import PipelineError
from pipeline.labelling.actor_layout import Layout, fit_to_machines
from pipeline.labelling.label_actor import LabelActor
from pipeline.labelling.shard_labeller import BATCH_SIZES, LabellerConfig
from pipeline.labelling.work_board import BoardHandle, Event, exchange
from pipeline.labelling.work_plan import Order, ShardOutcome, WorkPlan
from pipeline.runtime.ray_capacity import TOLD_SECONDS, RoomWatch, machines
from pipeline.runtime.ray_pulse import PulseWatch
from pipeline.runtime.ray_threads import waiting_in_ray
from pipeline.runtime.same_code import versions
from pipeline.runtime.watching import Watch

_SILENT_SECONDS = 30.0
"""After so long without a sign of life of whoever works at an order it is given to another actor, too."""
_COMPILED_CLIPS = 300_000
"""So many clips an actor pay for half a minute of compiling on a GPU: PaSST-S gains 0.1 ms a clip on an H100."""
_LOOK_SECONDS = 0.2
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
    left = sum(shards.values()) - sum(stop - start for pieces in (done or {}).values() for start, stop in pieces)
    config = fit_to_layout(config, layout, left)
    plan = WorkPlan(shards, actors=layout.max_actors, batch_size=config.batch_size, done=done)
    board = BoardHandle.open()
    foreman = _Foreman(plan, board, layout, min(_SILENT_SECONDS, config.patience), on_clips)
    run_pool = partial(_run_pool, config, layout, board)
    with waiting_in_ray(run_pool, "Ray Data", actors="MapWorker") as pool, _stopping(board):
        with PulseWatch(board, config.patience, on_look=foreman.look) as watch:
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
        wait([pool], timeout=_END_SECONDS)  # those that are lost, or wait for room, don't end by themselves


@contextmanager
def _stopping(board: BoardHandle) -> Iterator[None]:
    """Whatever ends the block, no actor begins another shard."""
    try:
        yield
    finally:
        board.tell("stop")


def fit_to_layout(config: LabellerConfig, layout: Layout, left: int) -> LabellerConfig:
    """Decide what nobody has: the device, the batches, and whether the clips that are left are worth compiling for."""
    device = "cuda" if layout.gpus_per_actor else "cpu"
    pays = device == "cuda" and left >= _COMPILED_CLIPS * layout.max_actors
    compiled = pays if config.compile is None else config.compile
    return replace(config, device=device, batch_size=config.batch_size or BATCH_SIZES[device], compile=compiled)


def _run_pool(config: LabellerConfig, layout: Layout, board: BoardHandle) -> None:
    """Let Ray Data run the actors; each works at a row until nothing is left to do."""
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
        LabelActor,
        fn_constructor_args=(config, layout, board, versions()),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=layout.actors, max_size=layout.max_actors, max_tasks_in_flight_per_actor=1),
        num_cpus=layout.cpus_per_actor,
        num_gpus=layout.gpus_per_actor,
    )
    for _ in rows.iter_rows():
        pass


def _raise_what_ended(pool: "Future[None]") -> None:
    error = pool.exception()
    if isinstance(error, RayError):
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. The same command goes on with what is missing.") from error
    if error is not None:
        raise error
    raise PipelineError("Ray ended before all was done. The same command goes on with what is missing.")


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
