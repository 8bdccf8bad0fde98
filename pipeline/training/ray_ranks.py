"""A training run on ranks that Ray Train starts, on one machine or a cluster's: the same code as under torchrun.

Imported only when somebody asks for `--ranks`, so that training needs no Ray.
"""

import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
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

from pipeline.errors import PipelineError, UsageError
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.ray_address import cluster_address
from pipeline.runtime.ray_capacity import has_room_on_gpus
from pipeline.runtime.ray_pulse import PulseWatch, beating
from pipeline.runtime.ray_threads import waiting_in_ray
from pipeline.runtime.same_code import check_versions, versions
from pipeline.runtime.stopping import stop_on_event, stop_on_signals
from pipeline.training.loop import TrainingConfig
from pipeline.training.rank_board import ANSWER_SECONDS, Board, News, may_be_mended, start_board, told_to
from pipeline.training.ranks import LAUNCH_VARIABLE, backend, start_seconds
from pipeline.training.run import RunResult

_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainingConfig)
_POLL_SECONDS = 0.2
_NEWS_SECONDS = 1.0
_WAIT_SECONDS = 30.0
"""How often a line tells what ranks wait for that have not started."""


def train_on_ray(command: Callable[[Config], RunResult], config: Config) -> RunResult:
    """Run a training command in `config.ranks` processes, each with a GPU where the cluster has any.

    Where one is lost, or its machine, all are started again, and go on from the run's newest checkpoint.

    Args:
        command: the command's `run`.
        config: its settings. All paths have to be the same on every machine; the first rank writes the run's folder.

    Raises:
        UsageError: the cluster has too few GPUs or cores.
        LostProcessError: no rank has given a sign of life for long.
        PipelineError: what `command` raises, or Ray itself fails.
    """
    patience = start_seconds(config.patience)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    with running_ray(config.address), tempfile.TemporaryDirectory() as scratch:
        on_gpus = has_room_on_gpus(config.device)
        kind = "GPU" if on_gpus else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if config.ranks > there and cluster_address(config.address) is None:  # a cluster may grow
            raise UsageError(f"--ranks {config.ranks}: the cluster has {there} {kind}s; a rank needs one of its own")
        board = start_board()
        trainer = TorchTrainer(
            _train_one_rank,
            train_loop_config={
                "command": command,
                "config": replace(config, ranks=1),
                "board": board,
                "launch": uuid.uuid4().hex,
                "folder": str(Path.cwd()),
                "versions": versions(),
            },
            scaling_config=ScalingConfig(num_workers=config.ranks, use_gpu=on_gpus),
            # The ranks' machines have GPUs or not; this one need have none.
            torch_config=TorchConfig(backend=backend(on_gpus=on_gpus), timeout_s=int(patience)),
            # Checkpoints are the run's own; Ray Train needs a folder for its notes all the same. It would try again for
            # ever where the ranks can't start, or a machine is taken away.
            run_config=RunConfig(
                storage_path=scratch,
                name="ranks",
                failure_config=FailureConfig(
                    max_failures=config.max_restarts,
                    max_preemption_failures=config.max_restarts,
                    controller_failure_limit=0,
                ),
            ),
        )
        try:
            # Where a rank is lost, the others find that out, and then all of them start once more.
            _fit(trainer, _News(board, config, kind), patience=config.patience + patience)
        except (TrainingFailedError, RayError, RuntimeError, ValueError) as error:
            _raise_if_told(board)
            reason = str(error).strip().splitlines()[-1]
            if "startup timed out" in reason:
                raise PipelineError(
                    f"--ranks {config.ranks}: the cluster has had no room for them within {patience:g} s. End what "
                    "else runs there, or allow more by --patience; --resume goes on with what is saved"
                ) from error
            raise PipelineError(f"Ray Train gave up: {reason}. The same command with --resume goes on") from error
        result = cast("dict[str, Any] | None", ray.get(board.result.remote(), timeout=ANSWER_SECONDS))
        if result is None:
            _raise_if_told(board)
            raise PipelineError("the ranks ended without a word. The same command with --resume goes on")
        return RunResult(**result)


def _fit(trainer: TorchTrainer, news: "_News", *, patience: float) -> None:
    """Train in a thread; meanwhile tell what the ranks tell, and pass on to them that this process is asked to end.

    In the main thread Ray Train would take Ctrl-C for itself, and save nothing.
    """
    remedy = "the same command with --resume goes on"
    with waiting_in_ray(trainer.fit, "Ray Train", actors="TrainController") as done:
        try:
            with stop_on_signals() as stop, PulseWatch(news.board, patience, remedy=remedy) as watch:
                while not wait([done], timeout=_POLL_SECONDS).done:
                    watch.check()
                    if stop.requested:
                        news.board.stop.remote()
                    news.look()
        except BaseException:
            news.board.stop.remote()  # a Ray that was there before stays, and so would ranks that nobody waits for
            raise
    news.look()
    done.result()


class _News:
    """Logs what the ranks log, that they were started again, and what they wait for to start.

    Args:
        board: where they say so.
        config: how many they are, and how often they may be started again.
        kind: what each needs one of: GPU or CPU.
    """

    def __init__(self, board: Board, config: TrainingConfig, kind: str) -> None:
        self.board, self._kind, self._ranks, self._max_restarts = board, kind, config.ranks, config.max_restarts
        self._starts, self._told = 1, time.monotonic()

    def look(self) -> None:
        """Look once, and wait for it only where the board does not answer."""
        try:
            news = cast("News", ray.get(self.board.news.remote(), timeout=_NEWS_SECONDS))
        except RayError:  # it is no reason to fail
            return
        if not news.waiting:
            self._told = time.monotonic()
        elif time.monotonic() - self._told > _WAIT_SECONDS:
            self._told = time.monotonic()
            there, free = (int(of().get(self._kind, 0)) for of in (ray.cluster_resources, ray.available_resources))
            wanted = f"{self._ranks} ranks wait for a {self._kind} each"
            _log.info("%s; the cluster has %d, of which %d are free", wanted, there, free)
        if news.starts > self._starts:
            self._starts = news.starts
            reason = f"{news.loss}. " if news.loss else "a rank was lost. "
            times = f"{news.starts - 1} of at most {self._max_restarts} times"
            _log.warning("%sAll ranks were started again (%s), from the newest checkpoint", reason, times)
        for level, line in news.lines:
            _log.log(level, "%s", line)


def _train_one_rank(settings: dict[str, Any]) -> None:
    board, config = settings["board"], settings["config"]
    os.environ[LAUNCH_VARIABLE] = settings["launch"]
    with suppress(OSError):  # on another machine there may be no such folder; then paths are absolute or URLs
        os.chdir(settings["folder"])
    if torch.cuda.is_available() and config.device == "auto":
        config = replace(config, device=str(ray.train.torch.get_device()))
    # Ranks on the same machine share its cores.
    torch.set_num_threads(
        min(torch.get_num_threads(), max(1, usable_cores() // ray.train.get_context().get_local_world_size()))
    )
    rank = ray.train.get_context().get_world_rank()
    if not ray.get(board.begin.remote(rank), timeout=ANSWER_SECONDS):
        return  # what ended the ranks before would end these
    with _stopped_by(board), told_to(board, rank), beating(board, f"rank {rank}"):
        try:
            check_versions(settings["versions"])
            result = settings["command"](config)
        except PipelineError as error:
            # Ray Train starts the ranks again where one of them raises something.
            mendable = ray.get(board.fail.remote(error, rank), timeout=ANSWER_SECONDS)
            if may_be_mended(error) and mendable:
                raise
            return
    if rank == 0:
        ray.get(board.finish.remote(asdict(result)), timeout=ANSWER_SECONDS)


def _raise_if_told(board: Board) -> None:
    error = cast("PipelineError | None", ray.get(board.error.remote(), timeout=ANSWER_SECONDS))
    if error is not None:
        raise error


@contextmanager
def _stopped_by(board: Board) -> Iterator[None]:
    """Let the board stop what runs in the block: Ray runs it outside the main thread, where no signal arrives."""
    event, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not (ended.is_set() or event.is_set()):
            try:
                if ray.get(board.stopping.remote(), timeout=ANSWER_SECONDS):
                    event.set()
            except RayError:  # the board is started again
                ended.wait(_POLL_SECONDS)

    threading.Thread(target=look, name="asked to stop", daemon=True).start()
    try:
        with stop_on_event(event):
            yield
    finally:
        ended.set()
