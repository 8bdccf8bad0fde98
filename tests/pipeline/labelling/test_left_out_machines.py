"""Machines that can't load the teachers, and GPUs that fail for good: without Ray, whose part a list plays."""

import logging
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.errors import CheckpointError, PipelineError
from pipeline.labelling import label_actor
from pipeline.labelling.actor_layout import Layout
from pipeline.labelling.actor_pool import _Foreman
from pipeline.labelling.clip_range import ClipRange
from pipeline.labelling.label_actor import LabelActor
from pipeline.labelling.shard_labeller import LabellerConfig
from pipeline.labelling.work_board import Event
from pipeline.labelling.work_plan import Order, WorkPlan
from pipeline.runtime.same_code import versions

ORDER = Order(number=7, steps=(ClipRange("a.tar", 0, 4),), seconds=60.0, tries=2)
CONFIG = LabellerConfig(data="", store="", teachers=(), stamp=cast("Any", None), batch_size=4)


class Board:
    """Hands out one order, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._orders = [ORDER]
        self._goes_on = [True, True, False]

    def ask(self, method: str, *given: object, patience: float) -> object:
        self.asked.append((method, *given))
        if method == "fetch":
            return bool(self._orders), self._orders.pop() if self._orders else None
        if method == "goes_on":
            return self._goes_on.pop(0)
        return None

    def tell(self, method: str, *given: object) -> None:
        self.asked.append((method, *given))

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: None)  # signs of life

    def methods(self) -> list[str]:
        return [method for method, *_ in self.asked]


def layout(workers: int) -> Layout:
    return Layout(actors=workers, max_actors=workers, cpus_per_actor=1, gpus_per_actor=0, own_share=False)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def actor(board: Board, monkeypatch: pytest.MonkeyPatch) -> LabelActor:
    monkeypatch.setattr(label_actor, "_REST_SECONDS", 0.0)
    monkeypatch.setattr(label_actor, "_this_machine", lambda: {"CPU": 1})
    monkeypatch.setattr(label_actor.platform, "node", lambda: "gpu-7")
    monkeypatch.setattr(label_actor.torch, "set_num_threads", lambda threads: None)
    return LabelActor(CONFIG, layout(2), cast("Any", board), versions())


def let_labeller_be(monkeypatch: pytest.MonkeyPatch, *made: object) -> list[object]:
    """Let what is made next be these, or raise them; returns those that were not made."""
    left = list(made)

    def make(config: LabellerConfig) -> object:
        one = left.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(label_actor, "ShardLabeller", make)
    return left


class Broken:
    """A labeller whose device refuses everything."""

    def compute(self, *given: object, **more: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")


def test_a_machine_that_cannot_load_the_teachers_gives_its_order_back_after_two_tries(
    actor: LabelActor, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = CheckpointError("passt.pt: hashes to 0123 on this machine")
    left = let_labeller_be(monkeypatch, wrong, wrong, "a third one")
    actor({"worker": label_actor.np.array([3])})
    assert board.asked[-4] == ("unfit", 3, 7, "gpu-7", "passt.pt: hashes to 0123 on this machine")
    assert left == ["a third one"]
    assert board.methods()[-3:] == ["goes_on"] * 3, (
        "it takes no other order, and none that is an actor's who still starts"
    )


@pytest.mark.parametrize(("package", "other"), [("audioset-distill", "0.1.0 (0123456789ab)"), ("torch", "2.10.0")])
def test_a_machine_with_another_version_of_the_program_or_of_torch_gives_its_order_back(
    actor: LabelActor, board: Board, monkeypatch: pytest.MonkeyPatch, package: str, other: str
) -> None:
    actor._versions = {**versions(), package: other}
    let_labeller_be(monkeypatch)
    actor({"worker": label_actor.np.array([3])})
    assert board.asked[-4][:4] == ("unfit", 3, 7, "gpu-7")
    assert board.asked[-4][4].endswith(
        f" has {package} {versions()[package]}, but the run was started by {package} {other}. Give every machine the "
        "same image or installation"
    )


def test_teachers_that_load_at_the_second_try_are_loaded(
    actor: LabelActor, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_labeller_be(monkeypatch, OSError("the disk was away"), Broken())
    actor({"worker": label_actor.np.array([3])})
    assert "unfit" not in board.methods()
    assert "step" in board.methods()


def test_a_process_whose_gpu_answers_no_more_says_so_and_ends(
    actor: LabelActor, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_labeller_be(monkeypatch, Broken())
    monkeypatch.setattr(label_actor, "still_works", lambda device: False)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        actor({"worker": label_actor.np.array([3])})
    assert board.asked[-1][0] == "tell"
    assert board.asked[-1][1].startswith(
        "gpu-7: its GPU has failed (RuntimeError: CUDA error: an illegal memory access"
    )


def test_the_run_goes_on_without_a_machine_and_names_it_until_none_is_left(caplog: pytest.LogCaptureFixture) -> None:
    plan = WorkPlan({"a.tar": 4}, actors=2, batch_size=4)
    foreman = _Foreman(plan, cast("Any", Board()), layout(2), 30.0, lambda clips: None)
    order = plan.take()
    assert order is not None
    with caplog.at_level(logging.WARNING):
        foreman._note(Event("unfit", order.number, (0, "gpu-7", "no such file")))
    assert "gpu-7 is left out: it can't load the teachers, tried twice: no such file" in caplog.text
    foreman.check()
    again = plan.take()
    assert again is not None
    assert again.steps == order.steps, "its order is for others"
    foreman._note(Event("unfit", again.number, (1, "gpu-8", "no such file")))
    with pytest.raises(PipelineError, match="no such file"):
        foreman.check()
