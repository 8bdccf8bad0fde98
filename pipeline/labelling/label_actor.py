"""What each Ray actor of stage 1 does: it loads the teachers and carries out orders that it fetches from the board."""

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported
from pipeline.runtime.imports import lasting_imports

# isort: split
with lasting_imports():  # most of an actor's start; Ray's own worker process has imported little so far
    import numpy as np
    import ray
    import torch
    from ray.exceptions import RayError

    from pipeline import redaction
    from pipeline.errors import LostProcessError, PipelineError, StorageFullError, StorageUnavailableError
    from pipeline.labelling.actor_layout import Layout, own_share
    from pipeline.labelling.clip_range import ClipRange, ShardJoin
    from pipeline.labelling.publisher import Publisher
    from pipeline.labelling.shard_decoder import Following
    from pipeline.labelling.shard_labeller import LabelledRange, LabellerConfig, ShardLabeller, ShardReport
    from pipeline.labelling.work_board import BoardHandle
    from pipeline.labelling.work_plan import Order, Step, StepOutcome, steps_and_followers
    from pipeline.models.device import still_works
    from pipeline.runtime.memory import keep_freed_memory
    from pipeline.runtime.ray_pulse import beating
    from pipeline.runtime.same_code import check_versions
    from pipeline.storage.outages import outlast

_IDLE_SECONDS = 0.3
_REST_SECONDS = 2.0

_log = logging.getLogger(__name__)


class LabelActor:
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
