"""What an actor does with its orders: computing ahead of what it publishes, doubling and losing nothing."""

import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.errors import LogitStoreError, LostProcessError, StorageFullError
from pipeline.labelling import label_actor
from pipeline.labelling.actor_layout import Layout
from pipeline.labelling.actor_pool import _Foreman, fit_to_layout
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.label_actor import LabelActor
from pipeline.labelling.shard_labeller import LabelledRange, LabellerConfig, ShardLabeller, ShardReport
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.labelling.work_board import WorkBoard
from pipeline.labelling.work_plan import Order, StepOutcome, WorkPlan
from pipeline.logits.store import open_store, write_stamp
from pipeline.runtime.same_code import versions

pytestmark = pytest.mark.ray
SECONDS = 20.0
"""More than any wait here takes."""
LAYOUT = Layout(actors=1, max_actors=1, cpus_per_actor=1, gpus_per_actor=0, own_share=False)
CONFIG = LabellerConfig(data="", store="", teachers=(), stamp=cast("Any", None), batch_size=2)


class Board:
    """A real board in this process; it stops once nothing waits any more."""

    def __init__(self, *orders: Order) -> None:
        self.board = WorkBoard()
        self.generation = self.board.exchange(orders, "", 0).generation
        self.asked: list[tuple[Any, ...]] = []

    def ask(self, method: str, *given: Any, patience: float = 0.0) -> Any:
        self.asked.append((method, *given))
        if method == "fetch" and not self.board._waiting:
            self.board.stop()
        return getattr(self.board, method)(*given)

    def tell(self, method: str, *given: Any) -> None:
        getattr(self.board, method)(*given)

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: None)  # signs of life

    def events(self) -> list[Any]:
        return self.board.exchange([], "", 0).events

    def outcomes(self) -> list[StepOutcome]:
        return [event.about for event in self.events() if event.what == "step"]


class Labeller:
    """Notes what it does; its methods can be exchanged."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def compute(self, step: ClipRange, on_progress: Callable[[int], None], *, following: Any, enough: Any) -> Any:
        self.done.append(("compute", step.shard))
        if callable(following):
            following()
        on_progress(2)
        return step

    def publish(self, made: ClipRange) -> ShardReport:
        self.done.append(("publish", made.shard))
        start, stop = made.start, made.stop or 2
        return ShardReport(shard=made.shard, start=start, stop=stop, published=True, clips=2, failed=0, seconds=1.0)

    def join_shard(self, join: ShardJoin) -> ShardReport:
        self.done.append(("join", join.shard))
        return self.publish(ClipRange(join.shard))


def order(number: int, *shards: str, start: int = 0) -> Order:
    steps = tuple(ClipRange(shard, start, start + 2) for shard in shards)
    return Order(number=number, steps=steps, seconds=60.0, tries=2)


@pytest.fixture
def labeller(monkeypatch: pytest.MonkeyPatch) -> Labeller:
    made = Labeller()
    monkeypatch.setattr(label_actor, "ShardLabeller", lambda config: made)
    return made


def work(board: Board, config: LabellerConfig = CONFIG) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_actor, "_this_machine", lambda: {"CPU": 1})
        patch.setattr(label_actor.torch, "set_num_threads", lambda threads: None)
        LabelActor(config, LAYOUT, cast("Any", board), versions())({"worker": np.array([3])})


def test_a_shard_is_published_while_the_next_one_is_computed_and_outcomes_come_in_order(labeller: Labeller) -> None:
    next_begun = {"a": threading.Event(), "b": threading.Event(), "c": threading.Event()}
    compute, publish = labeller.compute, labeller.publish

    def compute_and_tell(step: ClipRange, *given: Any, **more: Any) -> Any:
        if step.shard != "a":
            next_begun["abc"["abc".index(step.shard) - 1]].set()
        return compute(step, *given, **more)

    def publish_beside(made: ClipRange) -> ShardReport:
        if made.shard != "c":
            assert next_begun[made.shard].wait(SECONDS), "the next one waits for this one"
        return publish(made)

    labeller.compute, labeller.publish = compute_and_tell, publish_beside
    board = Board(order(1, "a", "b"), order(2, "c"))
    work(board)
    assert [outcome.shard for outcome in board.outcomes()] == ["a", "b", "c"]
    assert not any(outcome.error for outcome in board.outcomes())
    assert [(event.what, event.order) for event in board.events()] == [
        ("step", 1), ("step", 1), ("ended", 1), ("step", 2), ("ended", 2)
    ]  # fmt: skip
    assert board.board._in_hand[3] == set()


def test_the_next_order_is_fetched_before_the_last_shard_of_this_one_is_done(labeller: Labeller) -> None:
    board, following = Board(order(1, "a", "b"), order(2, "c")), {}
    compute = labeller.compute

    def compute_and_look(step: ClipRange, *given: Any, **more: Any) -> Any:
        announced = more.pop("following")
        following[step.shard] = announced() if callable(announced) else announced
        return compute(step, *given, following=None, **more)

    labeller.compute = compute_and_look
    work(board)
    assert {shard: one and one.shard for shard, one in following.items()} == {"a": "b", "b": "c", "c": None}
    assert [asked[0] for asked in board.asked].count("fetch") == 4, "none is fetched twice"


def test_an_order_is_fetched_ahead_only_where_nobody_else_goes_without() -> None:
    board = WorkBoard()
    board.exchange([order(1, "a"), order(2, "b"), order(3, "c")], "", 0)
    board.fetch(7)
    board.fetch(8)
    assert board.fetch(7, True) == (True, None), "the last one is for whoever is done first"
    assert board.fetch(8) == (True, order(3, "c"))


def test_what_goes_wrong_while_publishing_is_the_shards_outcome_and_the_others_are_done(labeller: Labeller) -> None:
    publish = labeller.publish

    def fail(made: ClipRange) -> ShardReport:
        if made.shard == "b":
            raise LogitStoreError("b: can't be written")
        return publish(made)

    labeller.publish = fail
    board = Board(order(1, "a", "b", "c", start=4))
    work(board)
    assert [(one.shard, one.start, one.error) for one in board.outcomes()] == [
        ("a", 4, ""), ("b", 4, "b: can't be written"), ("c", 4, "")
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["compute", "publish"])
def test_a_stretch_that_fails_is_told_as_the_stretch_that_it_is(labeller: Labeller, stage: str) -> None:
    def fail(*given: Any, **more: Any) -> Any:
        raise LostProcessError("decoding process 1 of 1 was killed")

    setattr(labeller, stage, fail)
    plan = WorkPlan({"a": 4}, actors=1, batch_size=2, done={"a": [(0, 2)]})
    taken = plan.take()
    assert taken is not None
    board = Board(taken)
    work(board)
    [outcome] = board.outcomes()
    plan.step_ended(taken.number, outcome)
    assert plan.step_of(taken.number) is None, "the plan knows which step it was"


def test_a_full_store_ends_the_order_while_the_next_shard_is_computed(labeller: Labeller) -> None:
    def fail(made: ClipRange) -> ShardReport:
        raise StorageFullError("no room")

    labeller.publish = fail
    board = Board(order(1, "a", "b", "c", "d"))
    work(board)
    assert board.outcomes()[0].ends_run
    assert ("compute", "d") not in labeller.done


def test_progress_counts_a_shard_whose_publishing_is_not_done_beside_the_next_one(labeller: Labeller) -> None:
    seen: list[int] = []
    board, publish = Board(order(1, "a", "b")), labeller.publish
    computed = threading.Event()
    compute = labeller.compute

    def compute_and_tell(step: ClipRange, *given: Any, **more: Any) -> Any:
        made = compute(step, *given, **more)
        if step.shard == "b":
            computed.set()
        return made

    def look(made: ClipRange) -> ShardReport:
        assert computed.wait(SECONDS)
        seen.append(board.board.exchange([], "", 0).clips[1])
        return publish(made)

    labeller.compute, labeller.publish = compute_and_tell, look
    work(board)
    assert seen == [4, 2], "both at first; the one that was told has gone over to the plan"


def test_time_that_the_next_shard_waited_for_a_publication_is_told(labeller: Labeller) -> None:
    board, publish = Board(order(1, "a", "b")), labeller.publish

    def publish_slowly(made: ClipRange) -> ShardReport:
        if made.shard == "a":
            threading.Event().wait(0.3)
        return publish(made)

    labeller.publish = publish_slowly
    work(board)
    first, last = board.outcomes()
    assert first.publishing_seconds > 0.1
    assert last.publishing_seconds <= first.publishing_seconds


class Killed(BaseException):
    """The end of the process."""


@pytest.fixture
def run(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, tmp_path: Path
) -> Callable[[Path, int | None], Mapping[str, bytes]]:
    """Makes a store of a small dataset by actors, the first of which dies at some publication."""
    manifest = build_dataset("data", make_noises(18, 5), clips_per_shard=6)
    spec = TeacherSpec.parse(make_teacher("passt_tiny"))
    stamp = stamp_teachers((spec,), manifest, "float32")

    def make(store: Path, dies_at: int | None) -> Mapping[str, bytes]:
        config = LabellerConfig(
            data=manifest.location, store=str(store), teachers=(spec,), stamp=stamp, batch_size=2, decode_workers=1
        )
        write_stamp(config.store, stamp)
        plan = WorkPlan(dict.fromkeys(manifest.shards, 6), actors=1, batch_size=2)
        board = Board()
        foreman = _Foreman(plan, cast("Any", board), LAYOUT, 30.0, lambda clips: None)
        orders = [replace(taken, seconds=60.0) for taken in iter(plan.take, None)]
        board.board.exchange(orders, "", 0)
        with closing(ShardLabeller(config)) as labeller:
            with suppress(Killed):
                work_until(board, labeller, dies_at)
            board.board.hello(3)
            while True:
                for event in board.events():
                    foreman._note(event)
                orders = list(iter(plan.take, None))
                if not orders:
                    break
                board = Board(*orders)
                work_until(board, labeller, None)
        assert plan.finished
        assert not any(outcome.error for outcome in plan.take_ended())
        return {path.name: path.read_bytes() for path in store.glob("*.parquet")}

    def work_until(board: Board, labeller: ShardLabeller, dies_at: int | None) -> None:
        published = 0
        publish = labeller.publish

        def publish_or_die(made: LabelledRange) -> ShardReport:
            nonlocal published
            if published == dies_at:
                raise Killed
            published += 1
            return publish(made)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labeller, "publish", publish_or_die)
            patch.setattr(label_actor, "ShardLabeller", lambda config: labeller)
            work(board)

    return make


@pytest.mark.usefixtures("one_thread")
def test_a_run_killed_between_computing_and_publishing_ends_with_the_parts_of_an_undisturbed_one(
    run: Callable, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", None)
    assert len(whole) == 3
    for dies_at in (0, 2):
        store = tmp_path / f"killed-{dies_at}"
        assert run(store, dies_at) == whole
        assert open_store(str(store)).clip_count == 18


@pytest.mark.parametrize(
    ("gpus", "left", "compiles"), [(1, 600_000, True), (1, 599_999, False), (0, 10_000_000, False)]
)
def test_teachers_are_compiled_where_each_of_two_gpus_has_long_enough_to_do(
    gpus: int, left: int, compiles: bool
) -> None:
    layout = replace(LAYOUT, max_actors=2, gpus_per_actor=gpus)
    fitted = fit_to_layout(replace(CONFIG, batch_size=0), layout, left)
    assert (fitted.compile, fitted.batch_size, fitted.device) == (
        (compiles, 64, "cuda") if gpus else (compiles, 16, "cpu")
    )
    assert fit_to_layout(replace(CONFIG, compile=not compiles), layout, left).compile is not compiles
