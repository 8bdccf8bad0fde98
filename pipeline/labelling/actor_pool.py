"""A pool of Ray actors that label shards: Ray Data hands out the shards, restarts what dies, and brings back outcomes.

The room's only module that imports Ray, so a machine without it can still label shards one by one.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from pipeline import redaction
from pipeline.errors import LostProcessError, PipelineError, StorageFullError
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller, ShardReport
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.ray_pulse import PulseBoard, PulseWatch, beating

_TRIES = 3
"""How often a shard is begun whose actor or decoding process is lost: killed by the kernel for its memory, or with its
machine, or stopped."""
_MAX_BATCHES = 100
"""A task's first batch has nobody to decode it ahead: among this many it no longer matters."""
_ANSWER_SECONDS = 10.0
"""How long the number of clips that are done may take to come, which nobody needs."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOutcome:
    """How one shard ended: with the figures of its report, or with what stopped it."""

    shard: str
    clips: int = 0
    failed: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    error: str = ""
    warning: str = ""
    """What else there is to say of it, though it may have been done in the end."""
    ends_run: bool = False
    """No shard will do better: the teachers could not be loaded, or the store is full."""


def label_shards(
    config: LabellerConfig,
    shards: Mapping[str, int],
    *,
    actors: int | None = None,
    cpus_per_actor: int | None = None,
    gpus_per_actor: float | None = None,
    on_clips: Callable[[int], None],
) -> Generator[ShardOutcome, None, None]:
    """Label shards on the running Ray; outcomes come as they are ready, one for each shard. Close it before Ray ends.

    Args:
        config: what the actors do; their device follows from the GPUs that they claim.
        shards: their names in the manifest, and how many clips each has.
        actors: how many; None is one for each GPU, or for each machine.
        cpus_per_actor: cores that each claims and computes with; None is an even share of all.
        gpus_per_actor: GPUs that each claims; None is 1 where there are any.
        on_clips: told from time to time, from another thread, how many more clips are done.

    Raises:
        LostProcessError: nobody has given a sign of life for `config.patience`.
        PipelineError: Ray itself fails, such as when the cluster goes away.
    """
    _keep_ray_data_quiet()
    layout = _fit_to_cluster(actors, cpus_per_actor, gpus_per_actor)
    board = _ProgressBoard.remote()  # pyright: ignore[reportAttributeAccessIssue]
    device = "cuda" if layout.gpus_per_actor else "cpu"
    tasks = divide(shards, layout.actors, max_clips=_MAX_BATCHES * config.batch_size)
    numbers = [{"task": number} for number in range(len(tasks))]
    outcomes = ray.data.from_items(numbers, override_num_blocks=len(tasks)).map_batches(
        _LabelActor,
        fn_constructor_args=(replace(config, device=device), tasks, layout.cpus_per_actor, board),
        batch_size=1,
        # One task at a time: a second one in an actor's queue would wait there while other actors have nothing to do.
        compute=ActorPoolStrategy(size=layout.actors, max_tasks_in_flight_per_actor=1),
        num_cpus=layout.cpus_per_actor,
        num_gpus=layout.gpus_per_actor,
    )
    watch = PulseWatch(board, config.patience, on_look=_Counting(board, on_clips).look, interrupts=True)
    try:
        with watch:
            for row in outcomes.iter_rows():
                yield ShardOutcome(**row)
    except KeyboardInterrupt:
        watch.check()
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. The same command goes on with what is missing.") from error
    finally:
        board.stop.remote()  # whatever ends the run, no actor begins another shard of its task


def divide(shards: Mapping[str, int], actors: int, *, max_clips: int) -> list[tuple[str, ...]]:
    """Divide shards into tasks, in their order: several small ones at first, one by one towards the end.

    An actor decodes the next shard of its task while it labels one, so a task of several wastes no time between them;
    but a long last task would leave the other actors without work. So each task takes half of an even share of what is
    left (guided self-scheduling: Polychronopoulos and Kuck 1987, doi:10.1109/TC.1987.5009495).

    Args:
        shards: their names, and how many clips each has.
        actors: how many share the work.
        max_clips: a task that has this many takes no further shard.
    """
    tasks: list[tuple[str, ...]] = []
    task: list[str] = []
    left, taken = sum(shards.values()), 0
    for shard, clips in shards.items():
        if task and taken + clips > min(left / (2 * actors), max_clips):
            tasks.append(tuple(task))
            left, task, taken = left - taken, [], 0
        task.append(shard)
        taken += clips
    return [*tasks, tuple(task)] if task else tasks


class _LabelActor:
    """Loads the teachers with the first shard, so that a failure comes back as an outcome, not as a dead actor."""

    def __init__(self, config: LabellerConfig, tasks: Sequence[Sequence[str]], cpus: int, board: Any) -> None:
        redaction.install()  # Ray keeps what an actor logs
        self._config = config
        self._tasks = tasks
        self._cpus = cpus
        self._board = board
        self._labeller: ShardLabeller | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        shards = self._tasks[int(batch["task"].item())]
        rows: list[dict[str, Any]] = []
        for shard, following in zip(shards, [*shards[1:], None], strict=True):
            with beating(self._board, shard):
                outcome = self._label(shard, following)
            rows.append(asdict(outcome))
            if outcome.ends_run:
                break
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _label(self, shard: str, following: str | None) -> ShardOutcome:
        """Label a shard; again where a process that decodes it is lost."""
        lost: list[str] = []
        while True:
            # Ray begins a task again, without end, when its actor is killed.
            asked = self._board.begin.remote(shard)
            times, ended = cast("tuple[int, ShardOutcome | None]", ray.get(asked, timeout=self._config.patience))
            if ended is not None:
                return ended
            if times > _TRIES:
                words = lost[-1] if lost else f"killed its worker {_TRIES} times; is there too little memory?"
                return ShardOutcome(shard=shard, error=words)
            try:
                # What was lost may have been lost over the following shard: a second try does without it.
                report = self._try_to_label(shard, following if times == 1 else None)
            except LostProcessError as error:
                lost.append(str(error))
                if self._labeller is None:
                    return ShardOutcome(shard=shard, error=lost[-1], ends_run=True)
                continue
            except Exception as error:
                # Ray would end the whole run. Whatever went wrong with this shard, the others can still be done.
                _log.exception("shard %s", shard)
                message = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
                return ShardOutcome(
                    shard=shard, error=message, ends_run=self._labeller is None or isinstance(error, StorageFullError)
                )
            outcome = ShardOutcome(**asdict(report), warning=f"{shard} was begun again: {lost[-1]}" if lost else "")
            self._board.end.remote(outcome)
            return outcome

    def _try_to_label(self, shard: str, following: str | None) -> ShardReport:
        if self._labeller is None:
            torch.set_num_threads(self._cpus)
            if self._config.device == "cpu":
                keep_freed_memory()  # 12 % less CPU time a clip, measured with the tiny teachers
            self._labeller = ShardLabeller(self._config)
        return self._labeller.label_shard(
            shard, lambda clips: self._board.set_done.remote(shard, clips), following=following
        )


@ray.remote(num_cpus=0, max_restarts=-1)
class _ProgressBoard(PulseBoard):
    """Where actors say what they begin and how far they are; it outlives them."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: Counter[str] = Counter()
        self._done: dict[str, int] = {}
        self._ended: dict[str, ShardOutcome] = {}
        self._stopped = False

    def begin(self, shard: str) -> tuple[int, ShardOutcome | None]:
        """Returns how often the shard was begun, this time included, and how it ended, if it has."""
        if self._stopped:
            return self._begun[shard], ShardOutcome(shard=shard, error="the run was stopped", ends_run=True)
        if shard not in self._ended:
            self._done[shard] = 0
            self._begun[shard] += 1
        return self._begun[shard], self._ended.get(shard)

    def end(self, outcome: ShardOutcome) -> None:
        self._ended[outcome.shard] = outcome

    def stop(self) -> None:
        self._stopped = True

    def set_done(self, shard: str, clips: int) -> None:
        self._done[shard] = clips

    def total(self) -> int:
        return sum(self._done.values())


class _Counting:
    """Tells how many more clips are done; from one thread."""

    def __init__(self, board: Any, on_clips: Callable[[int], None]) -> None:
        self._board, self._on_clips = board, on_clips
        self._done = 0

    def look(self) -> None:
        try:
            total = cast("int", ray.get(self._board.total.remote(), timeout=_ANSWER_SECONDS))
        except RayError:  # progress is no reason to fail
            return
        self._on_clips(total - self._done)
        self._done = total


@dataclass(frozen=True, slots=True)
class _Layout:
    actors: int
    cpus_per_actor: int
    gpus_per_actor: float


def _fit_to_cluster(actors: int | None, cpus_per_actor: int | None, gpus_per_actor: float | None) -> _Layout:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = sum(machine.get("GPU", 0) for machine in machines)
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if gpus else 0.0
    if actors is None:
        actors = max(1, int(gpus / gpus_per_actor) if gpus_per_actor else len(machines))
    # No more than the smallest machine has, or its share of the actors would wait for ever.
    share = min([sum(machine["CPU"] for machine in machines) / actors, *(machine["CPU"] for machine in machines)])
    return _Layout(actors, cpus_per_actor or max(1, int(share)), gpus_per_actor)


def _keep_ray_data_quiet() -> None:
    DataContext.get_current().enable_progress_bars = False
    logger = logging.getLogger("ray.data")
    # Its log file, in Ray's session folder, keeps everything.
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, logging.StreamHandler)]
