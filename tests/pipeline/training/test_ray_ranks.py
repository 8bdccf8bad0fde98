"""Ranks that Ray Train starts survive the loss of one of them; what a restart can't mend is told at once."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from busy_machine import tried_twice
from ray._private import state
from safetensors.torch import load_file
from several_ranks import run_ranks
from tiny_learner import TinyLearner
from torch import Tensor, nn

from pipeline.batches.join import TrainingBatch
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import CheckpointError, LostProcessError
from pipeline.training import ray_ranks
from pipeline.training.loop import TrainingConfig
from pipeline.training.rank_board import Board, start_board
from pipeline.training.ray_ranks import train_on_ray
from pipeline.training.run import RunResult, open_clips, run_training

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), clips=22)


@pytest.fixture(scope="module", autouse=True)
def two_cores() -> Iterator[None]:
    """A Ray for all of the module, whose processes find the tests' modules: a rank claims a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.shutdown()  # of what an earlier test has left in this process
        options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        tried_twice(ray.init, "local", **options)
        yield
        ray.shutdown()


def settings(data: Path, run: Path) -> TrainingConfig:
    return TrainingConfig(
        data=str(data),
        run=str(run),
        epochs=3,
        batch_size=7,
        learning_rate=0.3,
        workers=0,
        ranks=2,
        max_restarts=3,
        cache=str(run.parent / "cache"),
        checkpoint_minutes=0,
        device="cpu",
    )


class DyingLearner(TinyLearner):
    """Kills its process in the call of `loss` with a number that `deaths` names, on a rank, once for each file."""

    def __init__(self, witnesses: Path, deaths: dict[int, int]) -> None:
        super().__init__()
        self._witnesses, self._deaths = witnesses, deaths

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        loss = super().loss(network, batch, generator)
        witness = self._witnesses / f"rank {self._deaths.get(self.calls)}"
        if self._deaths.get(self.calls) == torch.distributed.get_rank() and not witness.exists():
            witness.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class LosingLearner(TinyLearner):
    """Kills the process in its second step whose number a file holds, and removes the file."""

    def __init__(self, victim: Path) -> None:
        super().__init__()
        self._victim = victim

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        loss = super().loss(network, batch, generator)
        if self.calls == 2 and torch.distributed.get_rank() == 0 and self._victim.exists():
            os.kill(int(self._victim.read_text()), signal.SIGKILL)
            self._victim.unlink()
        return loss


def train_and_kill(config: TrainingConfig, victim: Path) -> RunResult:
    learner, manifest = LosingLearner(victim), read_manifest(config.data)
    clips = open_clips(config, manifest, learner.model)  # pyright: ignore[reportArgumentType]
    return run_training(config, learner, dataset=clips, eval_dataset=None, schedule=lambda epoch: 1.0)


def train(config: TrainingConfig, witnesses: str, deaths: dict[int, int]) -> RunResult:
    learner, manifest = DyingLearner(Path(witnesses), deaths), read_manifest(config.data)
    clips = open_clips(config, manifest, learner.model)  # pyright: ignore[reportArgumentType]
    return run_training(config, learner, dataset=clips, eval_dataset=None, schedule=lambda epoch: 1.0)


def be_damaged_on_one(config: TrainingConfig, witnesses: str) -> RunResult:
    (Path(witnesses) / f"{torch.distributed.get_rank()} of process {os.getpid()}").touch()
    torch.distributed.barrier()  # a rank that comes later than the other's fault would not begin at all
    if torch.distributed.get_rank() == 1:
        raise CheckpointError("a fault that stays")
    raise LostProcessError("rank 1 of 2 is gone")


def test_a_run_whose_first_rank_is_killed_goes_on_to_the_uninterrupted_weights(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    straight = replace(settings(data, tmp_path / "straight"), ranks=1)
    assert [outcome.steps for outcome in run_ranks(2, train, straight, str(tmp_path), {})] == [9, 9]
    config = settings(data, tmp_path / "run")
    result = train_on_ray(partial(train, witnesses=str(tmp_path), deaths={3: 0}), config)
    assert (result.finished, result.steps) == (True, 9)
    assert (tmp_path / "rank 0").exists()
    expected, found = (load_file(tmp_path / run / "last.safetensors") for run in ("straight", "run"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    told = caplog.text
    assert "All ranks were started again (1 of at most 3 times), from the newest checkpoint" in told
    assert "resuming after step 2" in told
    assert "epoch 3/3: loss" in told  # what the first rank logs is passed on


def test_the_board_takes_no_memory_for_torch() -> None:
    script = "import sys; import pipeline.training.rank_board; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_a_board_that_is_lost_costs_no_step(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_noted() -> Board:
        board = start_board()
        ray.get(board.news.remote())  # it has begun
        (tmp_path / "board").write_text(str(state.actors(board._actor_id.hex())["Pid"]))
        return board

    monkeypatch.setattr(ray_ranks, "start_board", start_noted)
    caplog.set_level(logging.INFO)
    result = train_on_ray(partial(train_and_kill, victim=tmp_path / "board"), settings(data, tmp_path / "run"))
    assert not (tmp_path / "board").exists()
    assert (result.finished, result.steps) == (True, 9)
    assert "All ranks were started again" not in caplog.text
    assert "epoch 3/3: loss" in caplog.text


def test_what_a_restart_cannot_mend_is_told_after_one_start(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a fault that stays"):
        train_on_ray(partial(be_damaged_on_one, witnesses=str(tmp_path)), settings(data, tmp_path / "run"))
    assert len(list(tmp_path.glob("* of process *"))) == 2
