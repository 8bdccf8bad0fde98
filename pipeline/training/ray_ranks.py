"""A training run on ranks that Ray Train starts, on one machine or a cluster's: the same code as under torchrun.

Imported only when somebody asks for `--ranks`, so that training needs no Ray.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.runtime.ray_session import running_ray  # first: it sets what Ray reads while it is imported

# isort: split
import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError, UsageError
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.stopping import stop_on_event, stop_on_signals
from pipeline.training.loop import TrainingConfig
from pipeline.training.ranks import backend, start_seconds
from pipeline.training.run import RunResult

_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainingConfig)
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 60.0
"""How long the board may take to answer; it only notes what it is told."""


def train_on_ray(command: Callable[[Config], RunResult], config: Config) -> RunResult:
    """Run a training command in `config.ranks` processes, each with a GPU where the cluster has any.

    Args:
        command: the command's `run`.
        config: its settings. All paths have to be the same on every machine; the first rank writes the run's folder.

    Raises:
        UsageError: the cluster has too few GPUs or cores.
        PipelineError: what `command` raises, or Ray itself fails.
    """
    patience = start_seconds(config.patience)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    with running_ray(config.address), tempfile.TemporaryDirectory() as scratch:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if config.device != "cpu" else 0
        kind, there = ("GPU", gpus) if gpus else ("CPU", int(resources.get("CPU", 0)))
        if config.ranks > there:
            raise UsageError(f"--ranks {config.ranks}: the cluster has {there} {kind}s; a rank needs one of its own")
        # Beside this process, so that no other machine's end is its end.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = _Board.options(scheduling_strategy=here).remote()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = TorchTrainer(
            _train_one_rank,
            train_loop_config={
                "command": command,
                "config": replace(config, ranks=1),
                "board": board,
                "folder": str(Path.cwd()),
            },
            scaling_config=ScalingConfig(num_workers=config.ranks, use_gpu=gpus > 0),
            # The ranks' machines have GPUs or not; this one need have none.
            torch_config=TorchConfig(backend=backend(on_gpus=gpus > 0), timeout_s=int(patience)),
            # Checkpoints are the run's own; Ray Train needs a folder for its notes all the same. It would try again for
            # ever where the ranks can't start, or a machine is taken away.
            run_config=RunConfig(
                storage_path=scratch,
                name="ranks",
                failure_config=FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        try:
            _fit(trainer, board)
        except (TrainingFailedError, RayError, RuntimeError, ValueError) as error:
            _raise_if_told(board)
            reason = str(error).strip().splitlines()[-1]
            if "startup timed out" in reason:
                raise PipelineError(
                    f"--ranks {config.ranks}: the cluster has had no room for them within {patience:g} s. End what "
                    "else runs there, or allow more by --patience"
                ) from error
            raise PipelineError(f"Ray Train gave up: {reason}. The same command with --resume goes on") from error
        _raise_if_told(board)
        result = cast("RunResult", ray.get(board.result.remote(), timeout=_ANSWER_SECONDS))
        if not result.finished:  # what the ranks log stays with Ray
            _log.warning("stopped after step %d; all is saved, and --resume goes on", result.steps)
        return result


def _fit(trainer: TorchTrainer, board: Any) -> None:
    """Train in a thread, and pass on to the ranks that this process is asked to end.

    In the main thread Ray Train would take Ctrl-C for itself, and save nothing.
    """
    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=fit, name="Ray Train", daemon=True).start()
    with stop_on_signals() as stop:
        while not wait([done], timeout=_POLL_SECONDS).done:
            if stop.requested:
                board.stop.remote()
    done.result()


def _train_one_rank(settings: dict[str, Any]) -> None:
    board, config = settings["board"], settings["config"]
    with suppress(OSError):  # on another machine there may be no such folder; then paths are absolute or URLs
        os.chdir(settings["folder"])
    if torch.cuda.is_available() and config.device == "auto":
        config = replace(config, device=str(ray.train.torch.get_device()))
    # Ranks on the same machine share its cores.
    torch.set_num_threads(
        min(torch.get_num_threads(), max(1, usable_cores() // ray.train.get_context().get_local_world_size()))
    )
    is_first = ray.train.get_context().get_world_rank() == 0
    with _stopped_by(board):
        try:
            result = settings["command"](config)
        except PipelineError as error:
            with suppress(RayError):
                ray.get(board.fail.remote(error, is_first), timeout=_ANSWER_SECONDS)
            raise
    if is_first:
        ray.get(board.finish.remote(result), timeout=_ANSWER_SECONDS)


@ray.remote(num_cpus=0)
class _Board:
    """Where the command says that it is to stop, and the ranks say how they ended."""

    def __init__(self) -> None:
        self._stopping = False
        self._result: RunResult | None = None
        self._error: PipelineError | None = None

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def finish(self, result: RunResult) -> None:
        self._result = result

    def result(self) -> RunResult | None:
        return self._result

    def fail(self, error: PipelineError, of_the_first_rank: bool) -> None:
        if of_the_first_rank or self._error is None:
            self._error = error  # the first rank also says what is saved

    def error(self) -> PipelineError | None:
        return self._error


def _raise_if_told(board: Any) -> None:
    error = cast("PipelineError | None", ray.get(board.error.remote(), timeout=_ANSWER_SECONDS))
    if error is not None:
        raise error


@contextmanager
def _stopped_by(board: Any) -> Iterator[None]:
    """Let the board stop what runs in the block: Ray runs it outside the main thread, where no signal arrives."""
    event = threading.Event()

    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_POLL_SECONDS):
            with suppress(RayError):
                if ray.get(board.stopping.remote(), timeout=_ANSWER_SECONDS):
                    event.set()

    threading.Thread(target=look, daemon=True).start()
    try:
        with stop_on_event(event):
            yield
    finally:
        ended.set()
