"""A pool of Ray actors that label shards: Ray Data hands out the shards, restarts what dies, and brings back outcomes.

This is the only module that imports Ray, so a machine without it can still label shards one by one.
"""

import logging
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

# Ray reads these while it is imported and started. In order: `uv run` as launcher would make every worker rebuild the
# environment; no usage statistics are sent to Ray's makers; no internal notes between the lines of a progress bar.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from pipeline import redaction
from pipeline.errors import PipelineError, UsageError
from pipeline.memory import keep_freed_memory
from pipeline.stages.shard_labeller import LabellerConfig, ShardLabeller

_OBJECT_STORE_BYTES = 100 * 2**20
"""Shard names and reports are all that travels; the default would claim a third of the machine's memory."""
_TRIES = 3
"""How often a shard is begun whose actor gets killed, by the kernel for its memory or with its machine."""
_POLL_SECONDS = 0.5

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
    could_not_start: bool = False
    """The teachers could not be loaded, so that no shard will do better."""


@contextmanager
def running_ray(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or run Ray on this machine for as long as the block lasts; join a Ray that runs already.

    Raises:
        UsageError: there is no cluster at the address.
    """
    if address is not None:
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    local = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES} if address is None else {}
    try:
        with _muted_stderr():  # a note that the log level above was understood
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "Ray can't be started on this machine" if address is None else f"--address {address}"
        raise UsageError(f"{where}: {str(error.__cause__ or error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask first whether anybody is there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UsageError(
                f"--address {address}: no Ray cluster answers there ({error.strerror or error})"
            ) from error


@contextmanager
def _muted_stderr() -> Iterator[None]:
    # Ray's C++ part writes to the descriptor, past `sys.stderr`.
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def label_shards(
    config: LabellerConfig,
    shards: Sequence[str],
    *,
    actors: int | None = None,
    cpus_per_actor: int | None = None,
    gpus_per_actor: float | None = None,
    on_clips: Callable[[int], None],
) -> Iterator[ShardOutcome]:
    """Label shards on the running Ray; outcomes come as they are ready, one for each shard.

    Args:
        config: what the actors do; their device follows from the GPUs that they claim.
        shards: their names in the manifest.
        actors: how many; None is one for each GPU, or for each machine.
        cpus_per_actor: cores that each claims and computes with; None is an even share of all.
        gpus_per_actor: GPUs that each claims; None is 1 where there are any.
        on_clips: told from time to time, from another thread, how many more clips are done.

    Raises:
        PipelineError: Ray itself fails, such as when the cluster goes away.
    """
    _keep_ray_data_quiet()
    layout = _fit_to_cluster(actors, cpus_per_actor, gpus_per_actor)
    board = _ProgressBoard.remote()  # pyright: ignore[reportAttributeAccessIssue]
    device = "cuda" if layout.gpus_per_actor else "cpu"
    outcomes = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map_batches(
        _LabelActor,
        fn_constructor_args=(replace(config, device=device), layout.cpus_per_actor, board),
        batch_size=1,
        # One shard at a time: a second one in an actor's queue would wait there while other actors have nothing to do.
        compute=ActorPoolStrategy(size=layout.actors, max_tasks_in_flight_per_actor=1),
        num_cpus=layout.cpus_per_actor,
        num_gpus=layout.gpus_per_actor,
    )
    try:
        with _polling(board, on_clips):
            for row in outcomes.iter_rows():
                yield ShardOutcome(**row)
    except RayError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. The same command goes on with what is missing.") from error


class _LabelActor:
    """Loads the teachers with the first shard, so that a failure comes back as an outcome, not as a dead actor."""

    def __init__(self, config: LabellerConfig, cpus: int, board: Any) -> None:
        redaction.install()  # Ray keeps what an actor logs
        self._config = config
        self._cpus = cpus
        self._board = board
        self._labeller: ShardLabeller | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        outcome = self._label(str(batch["shard"].item()))
        return {name: [value] for name, value in asdict(outcome).items()}

    def _label(self, shard: str) -> ShardOutcome:
        # Ray begins a shard again, without end, when its actor is killed.
        if cast("int", ray.get(self._board.begin.remote(shard))) > _TRIES:
            return ShardOutcome(shard=shard, error=f"killed its worker {_TRIES} times; is there too little memory?")
        try:
            if self._labeller is None:
                torch.set_num_threads(self._cpus)
                if self._config.device == "cpu":
                    keep_freed_memory()  # 12 % less CPU time a clip, measured with the tiny teachers
                self._labeller = ShardLabeller(self._config)
            report = self._labeller.label_shard(shard, lambda clips: self._board.set_done.remote(shard, clips))
        except Exception as error:
            # Ray would end the whole run. Whatever went wrong with this shard, the others can still be done.
            _log.exception("shard %s", shard)
            message = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
            return ShardOutcome(shard=shard, error=message, could_not_start=self._labeller is None)
        return ShardOutcome(**asdict(report))


@ray.remote(num_cpus=0, max_restarts=-1)
class _ProgressBoard:
    """Where actors say what they begin and how far they are; it outlives them."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._done: dict[str, int] = {}

    def begin(self, shard: str) -> int:
        """Give how often the shard was begun, this time included."""
        self._done[shard] = 0
        self._begun[shard] += 1
        return self._begun[shard]

    def set_done(self, shard: str, clips: int) -> None:
        self._done[shard] = clips

    def total(self) -> int:
        return sum(self._done.values())


@contextmanager
def _polling(board: Any, on_clips: Callable[[int], None]) -> Iterator[None]:
    """Read the board from a thread; a last time when the block ends."""
    ended = threading.Event()

    def poll() -> None:
        seen = 0
        while True:
            last_time = ended.wait(_POLL_SECONDS)
            try:
                total = cast("int", ray.get(board.total.remote(), timeout=10))
            except RayError:  # progress is no reason to fail
                total = seen
            on_clips(total - seen)
            seen = total
            if last_time:
                return

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=15)


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
