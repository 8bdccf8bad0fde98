"""Several processes train one model: the same curve as one process, and as hard to break."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from several_ranks import run_ranks
from tiny_learner import TinyLearner
from torch import Tensor, nn

import student
from pipeline.batches.join import TrainingBatch
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import LostProcessError, PipelineError, TooManyFailuresError, TrainingDivergedError, UsageError
from pipeline.runtime.progress import read_metrics
from pipeline.training import heartbeats
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.heartbeats import Heartbeats
from pipeline.training.loop import Learner, TrainingConfig
from pipeline.training.optimizing import AverageConfig, OptimizerConfig
from pipeline.training.ranks import Ranks, backend, process_group
from pipeline.training.run import RunResult, open_clips, run_training
from pipeline.training.student_learner import StudentLearner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    """22 clips, of which two can't be decoded: the ranks' shares of a batch are not equally large."""
    return make_dataset(tmp_path_factory.mktemp("data"), clips=22, broken=(5, 11))


def settings(data: Path, run: Path) -> TrainingConfig:
    return TrainingConfig(
        data=str(data),
        eval_data=str(data),
        run=str(run),
        epochs=3,
        batch_size=7,
        learning_rate=0.3,
        workers=0,
        cache=str(run.parent / "cache"),
        max_failed=0.2,
        checkpoint_minutes=0,
        keep_checkpoints=100,
        log_every=1,
        optimizer=OptimizerConfig(max_gradient_norm=0.5),
        average=AverageConfig(kind="ema", decay=0.5),
        device="cpu",
    )


class Deadly(TinyLearner):
    """Sends its process a signal in the call of `loss` whose number is `at`, on one rank or on all."""

    def __init__(self, at: int, number: signal.Signals, rank: int | None = None, witness: Path | None = None) -> None:
        super().__init__()
        self._at, self._number, self._rank, self._witness = at, number, rank, witness

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        loss = super().loss(network, batch, generator)
        if self.calls == self._at and (self._rank is None or int(os.environ["RANK"]) == self._rank):
            if self._witness is not None:
                self._witness.touch()
            os.kill(os.getpid(), self._number)
        return loss


class Asleep(Deadly):
    """Sleeps instead."""

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        if self.calls + 1 == self._at and int(os.environ["RANK"]) == self._rank:
            lie_down()
        return super().loss(network, batch, generator)


def lie_down() -> None:
    time.sleep(1000)


class SlowStart(TinyLearner):
    """Takes its time before the second epoch, on the second rank: computes, or sleeps."""

    def __init__(self, seconds: float, *, at_work: bool) -> None:
        super().__init__()
        self._seconds, self._at_work = seconds, at_work

    def begin_epoch(self, network: nn.Module, epoch: int) -> None:
        if (epoch, os.environ["RANK"]) != (1, "1") or not self._seconds:
            return
        if not self._at_work:
            lie_down()
        seconds, self._seconds = self._seconds, 0.0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


class StoppedMeanwhile(SlowStart):
    """The first rank is asked to end while the second one sleeps."""

    def begin_epoch(self, network: nn.Module, epoch: int) -> None:
        if (epoch, os.environ["RANK"]) == (1, "0"):
            heartbeats._STOP_SECONDS = 1.0
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        super().begin_epoch(network, epoch)


class NanOnOneRank(TinyLearner):
    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        loss = super().loss(network, batch, generator)
        return loss * float("nan") if self.calls == 3 and os.environ["RANK"] == "1" else loss


class Faulty(TinyLearner):
    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        if self.calls == 2 and os.environ["RANK"] == "1":
            raise ValueError("a fault of this rank's own")
        return super().loss(network, batch, generator)


class SmallStudent(StudentLearner):
    """The real student's learner with everything on that is drawn for each clip, and a narrow network."""

    def __init__(self, mixup: student.MixupConfig) -> None:
        torch.manual_seed(0)
        augment = student.AugmentConfig(roll_samples=100, gain_db=6, mask_mels=20, mask_frames=10)
        super().__init__(student.create_model("mn01", num_classes=4), student.DistillConfig(), mixup, augment)
        self.model.input_seconds = 0.5


def train(config: TrainingConfig, make: Callable[..., Learner] = TinyLearner, *arguments: object) -> RunResult:
    learner, manifest = make(*arguments), read_manifest(config.data)
    return run_training(
        config,
        learner,
        dataset=open_clips(config, manifest, learner.model),  # pyright: ignore[reportArgumentType]
        eval_dataset=open_clips(config, manifest, learner.model) if config.eval_data else None,  # pyright: ignore[reportArgumentType]
        schedule=lambda epoch: 1.0,
    )


def curve(run: Path, name: str = "train/loss") -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    for name in ("last", "best"):
        expected = load_file(theirs / f"{name}.safetensors")
        found = load_file(ours / f"{name}.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps in three epochs, on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(settings(data, run))
    return run


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same nine steps on two processes, each with a loader process."""
    run = tmp_path_factory.mktemp("together") / "run"
    one, other = run_ranks(2, train, replace(settings(data, run), workers=1))
    assert one == other
    assert (one.finished, one.steps) == (True, 9)
    return run


def test_two_ranks_have_the_loss_curve_of_one(alone: Path, together: Path) -> None:
    assert len(curve(alone)) == 9
    for name in ("train/loss", "train/gradient_norm", "epoch/loss"):
        np.testing.assert_allclose(curve(together, name), curve(alone, name), rtol=2e-4)
    assert (together / "failed.csv").read_text() == (alone / "failed.csv").read_text()


def test_two_ranks_are_judged_as_one_is(together: Path, alone: Path, data: Path, tmp_path: Path) -> None:
    assert curve(together, "eval/clips") == curve(alone, "eval/clips") == [20.0] * 3
    # The same weights: a run of one rank that resumes behind the last step of two has only to judge them.
    weights = {path.name: path for path in list_checkpoints(together)}
    state = torch.load(weights["step-00000009.pt"], weights_only=True)
    last = TinyLearner()
    last.model.load_state_dict({k.removeprefix("module."): v for k, v in state["average"].items() if "." in k})
    dataset = open_clips(settings(data, tmp_path), read_manifest(data), last.model)
    batches = [dataset[rows] for rows in np.array_split(np.arange(22), 4)]
    last.model.eval()
    with torch.no_grad():
        logits = torch.cat([last.model(last.model.front_end(batch.waveforms))[batch.valid] for batch in batches])
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    assert curve(together, "eval/mAP")[-1] == last.score(logits.numpy(), labels.numpy())["mAP"]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_position_belongs_to_one_rank_and_neighbours_stay_together(size: int, accumulate: int) -> None:
    for whole in (12, 13, 64):
        slices = [one for rank in range(size) for one in Ranks(rank, size).micro_batches(whole, accumulate)]
        assert [position for one in slices for position in range(whole)[one]] == list(range(whole))
        assert all(one.start % 2 == 0 for one in slices)


@pytest.mark.parametrize("of", ["spectrogram", "waveform"])
def test_a_student_on_two_ranks_in_two_pieces_has_the_curve_of_one_rank(data: Path, tmp_path: Path, of: str) -> None:
    mixup = student.MixupConfig(of=of)  # pyright: ignore[reportArgumentType]
    base = replace(settings(data, tmp_path / "alone"), epochs=1, learning_rate=0.02, eval_data=None, batch_size=10)
    train(base, SmallStudent, mixup)
    outcomes = run_ranks(2, train, replace(base, run=str(tmp_path / "two")), SmallStudent, mixup)
    assert [outcome.steps for outcome in outcomes] == [2, 2]
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "alone"), rtol=1e-4)


def test_ranks_on_gpus_meet_by_nccl_whatever_the_machine_that_starts_them_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend(on_gpus=True) == "cpu:gloo,cuda:nccl"
    assert backend(on_gpus=False) == "gloo"


def test_without_whole_batch_statistics_ranks_resume_to_the_same_bits_too(data: Path, tmp_path: Path) -> None:
    base = replace(settings(data, tmp_path / "straight"), sync_batch_norm=False, epochs=2)
    one, other = run_ranks(2, train, base)
    assert one == other
    stopped = replace(base, run=str(tmp_path / "stopped"), checkpoint_minutes=60)
    run_ranks(2, train, stopped, Deadly, 2, signal.SIGTERM)
    run_ranks(2, train, replace(stopped, resume=True))
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.parametrize("at", [1, 5, 9])
def test_ranks_killed_at_any_step_resume_to_the_same_bits(data: Path, tmp_path: Path, together: Path, at: int) -> None:
    config = settings(data, tmp_path / "run")
    assert run_ranks(2, train, config, Deadly, at, signal.SIGKILL) == [-signal.SIGKILL] * 2
    assert len(list_checkpoints(tmp_path / "run")) == at - 1
    outcomes = run_ranks(2, train, replace(config, resume=True, workers=1))
    assert [outcome.steps for outcome in outcomes] == [9, 9]
    assert_same_weights(tmp_path / "run", together)
    assert curve(tmp_path / "run") == curve(together)


def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(data: Path, tmp_path: Path, together: Path) -> None:
    config = replace(settings(data, tmp_path / "run"), checkpoint_minutes=60)
    asked = tmp_path / "asked"
    outcomes = run_ranks(2, train, config, Deadly, 4, signal.SIGTERM, 1, asked)
    assert time.time() - asked.stat().st_mtime < 10
    assert [(outcome.finished, outcome.steps) for outcome in outcomes] == [(False, 4), (False, 4)]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004.pt"]
    run_ranks(2, train, replace(config, resume=True))
    assert_same_weights(tmp_path / "run", together)


@pytest.mark.parametrize(
    ("make", "number", "said"),
    [
        (Deadly, signal.SIGKILL, "is gone, as when it is killed for memory; its last output tells more"),
        (Deadly, signal.SIGSTOP, "has given no sign of life for 2 s: it is stopped, by SIGSTOP or a debugger"),
        (Asleep, signal.SIGSTOP, "no sign of life for 2 s: it is at lie_down (pipeline/training/test_ranks.py:"),
    ],
    ids=["killed", "stopped", "asleep"],
)
def test_a_rank_lost_in_a_step_is_named_and_all_before_that_step_is_saved(
    data: Path, tmp_path: Path, together: Path, make: type[Deadly], number: signal.Signals, said: str
) -> None:
    patience, last = (300, None) if number == signal.SIGKILL else (2, 0)
    config = replace(settings(data, tmp_path / "run"), checkpoint_minutes=60, patience=patience)
    survivor = run_ranks(2, train, config, make, 3, number, 1, last=last)[0]
    assert isinstance(survivor, LostProcessError)
    assert str(survivor).startswith("rank 1 of 2 (process ")
    assert said in str(survivor)
    assert str(survivor).endswith("; all up to step 2 is kept, and --resume goes on from there")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002.pt"]
    assert [outcome.steps for outcome in run_ranks(2, train, replace(config, resume=True))] == [9, 9]
    assert_same_weights(tmp_path / "run", together)


def test_a_rank_that_does_not_come_to_the_next_step_is_named(data: Path, tmp_path: Path) -> None:
    config = replace(settings(data, tmp_path / "run"), checkpoint_minutes=60, patience=1)
    survivor = run_ranks(2, train, config, partial(SlowStart, 1000, at_work=False), last=0)[0]
    assert isinstance(survivor, LostProcessError)
    assert "no sign of life for 1 s: it is at lie_down" in str(survivor)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000003.pt"]


def test_whoever_is_asked_to_end_does_not_wait_long_for_a_rank_that_sleeps(data: Path, tmp_path: Path) -> None:
    config = replace(settings(data, tmp_path / "run"), checkpoint_minutes=60)
    survivor = run_ranks(2, train, config, partial(StoppedMeanwhile, 1000, at_work=False), last=0)[0]
    assert "no sign of life for 1 s: it is at lie_down" in str(survivor)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000003.pt"]


def test_a_rank_that_works_is_waited_for(data: Path, tmp_path: Path) -> None:
    config = replace(settings(data, tmp_path / "run"), patience=1)
    outcomes = run_ranks(2, train, config, partial(SlowStart, 4, at_work=True))
    assert [outcome.steps for outcome in outcomes] == [9, 9]


def test_what_ended_a_rank_is_what_the_others_say(data: Path, tmp_path: Path) -> None:
    survivor, ended = run_ranks(2, train, settings(data, tmp_path / "run"), Faulty)
    assert str(ended) == "a fault of this rank's own"
    assert str(survivor).startswith("rank 1 ended: ValueError: a fault of this rank's own; all up to step 2 is kept")


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "for 2 s: it is stopped")])
def test_a_first_rank_that_is_lost_with_the_store_is_named_too(
    data: Path, tmp_path: Path, number: signal.Signals, said: str
) -> None:
    config = replace(settings(data, tmp_path / "run"), patience=2)
    last = None if number == signal.SIGKILL else 0
    _, survivor = run_ranks(2, train, config, Deadly, 3, number, 0, last=last)
    assert str(survivor).startswith("rank 0 of 2 (process ")
    assert said in str(survivor)
    assert str(survivor).endswith("what the first rank saved is kept, and --resume goes on from there")


def test_a_rank_that_is_lost_where_it_waits_for_the_others_is_named() -> None:
    complaint, _ = run_ranks(2, _meet_one_who_is_stopped, last=0)
    assert complaint.startswith("rank 1 of 2 (process ")
    assert "no sign of life for 1 s: it is stopped, by SIGSTOP" in complaint


def _meet_one_who_is_stopped() -> str:
    """The second rank comes to a meeting first, and is stopped there: it has come as far as the other one then."""
    with _two_ranks() as ranks:
        if ranks.rank == 1:
            ranks.all_reduce([1, 2, 3])
        ours = ranks.heartbeats
        assert ours is not None
        while ours.beats[1].collectives <= ours.collectives:
            time.sleep(0.05)
        os.kill(ours.beats[1].process, signal.SIGSTOP)
        with pytest.raises(LostProcessError) as raised:
            ranks.all_reduce([1, 2, 3])
    return str(raised.value)


def test_ranks_that_are_all_there_and_still_do_not_hear_each_other_say_so() -> None:
    said = "come to the same point, but their connections have carried nothing for 2 s"
    assert any(said in complaint for complaint in run_ranks(2, _meet_apart))  # the one that ends first is gone then


def _meet_apart() -> str:
    """Each rank exchanges in another group: as with a network that is cut between them, but not to the store."""
    with _two_ranks() as ranks:
        apart = [torch.distributed.new_group(backend="gloo") for _ in range(2)]
        assert ranks.heartbeats is not None
        ranks.heartbeats._group = apart[ranks.rank]
        with pytest.raises(LostProcessError) as raised:
            ranks.all_reduce([1, 2, 3])
    return str(raised.value)


@contextmanager
def _two_ranks() -> Iterator[Ranks]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ranks = Ranks(rank, 2, rank, Heartbeats(rank, 2, patience=1))
    ranks.all_gather("both are there")
    yield ranks


def test_a_rank_that_is_lost_ends_a_step_that_only_an_abort_can_end() -> None:
    [(aborted, complaint), _] = run_ranks(2, _wait_in_a_step, last=0)
    assert aborted
    assert complaint.startswith("rank 1 of 2 (process ")
    assert "no sign of life for 1 s: it is stopped" in complaint


def _wait_in_a_step() -> tuple[bool, str]:
    """Stands for a kernel of NCCL's, which waits on the GPU for the other ranks until it is aborted."""
    aborted = threading.Event()
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeats, "_abort", lambda self: aborted.set())
        rank = torch.distributed.get_rank()
        ranks = Ranks(rank, 2, rank, Heartbeats(rank, 2, 1, on_gpus=True))
        ranks.all_gather("both are there")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(LostProcessError) as raised:
            _step(ranks, aborted)
    return aborted.is_set(), str(raised.value)


def _step(ranks: Ranks, aborted: threading.Event) -> None:
    with ranks.step():
        torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        aborted.wait(20)
        ranks.check()


@pytest.mark.parametrize(("rank", "torchrun"), [(0, False), (1, False), (1, True)])
def test_ranks_that_do_not_all_start_say_so(monkeypatch: pytest.MonkeyPatch, rank: int, torchrun: bool) -> None:
    monkeypatch.setattr("pipeline.training.ranks._START_SECONDS", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**place, "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": torchrun}.items():
        monkeypatch.setenv(name, str(value))
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if torchrun else None
    complaint = f"not all of the 2 ranks met at 127.0.0.1:{port} within 1 s, of which this is rank {rank}"
    with pytest.raises(LostProcessError, match=complaint), process_group(patience=1):
        pass
    del store


def test_a_loss_that_is_no_number_on_one_rank_stops_all(data: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(2, train, settings(data, tmp_path / "run"), NanOnOneRank)
    for outcome in outcomes:
        assert isinstance(outcome, TrainingDivergedError)
        assert str(outcome).startswith("step 3: the loss is nan")
        assert str(outcome).count("clip") >= 7
    assert "step-00000002.pt" in str(outcomes[0])
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000002.pt"


def test_too_many_failures_end_all_ranks_alike(data: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(2, train, replace(settings(data, tmp_path / "run"), max_failed=0.05))
    assert {type(outcome) for outcome in outcomes} == {TooManyFailuresError}
    assert str(outcomes[0]) == str(outcomes[1])


def test_what_the_first_rank_refuses_all_ranks_refuse(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    outcomes = run_ranks(2, train, settings(data, tmp_path / "run"))
    assert all(isinstance(outcome, UsageError) and "is not empty" in str(outcome) for outcome in outcomes)


def test_a_batch_that_leaves_a_rank_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(2, train, replace(settings(data, tmp_path / "run"), batch_size=2))
    assert all(isinstance(outcome, UsageError) and "batch_size is 2" in str(outcome) for outcome in outcomes)


def test_ranks_sum_collect_and_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as one:
        assert (one.all_reduce([3, 4]), one.all_gather("x"), one.broadcast(lambda: 5)) == ([3, 4], ["x"], 5)
    assert run_ranks(2, _talk) == [([1, 2], [0, 1], "from 0"), ([1, 2], [0, 1], "from 0")]


def _talk() -> tuple[list[int], list[int], str]:
    with process_group() as ranks:
        with pytest.raises(PipelineError, match="only the first"):
            ranks.broadcast(_refuse)
        return (
            ranks.all_reduce([ranks.rank, 1]),
            ranks.all_gather(ranks.rank),
            ranks.broadcast(lambda: f"from {ranks.rank}"),
        )


def _refuse() -> None:
    raise PipelineError("only the first says so")
