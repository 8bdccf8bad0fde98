"""What is labelled next: nothing is lost, nothing is done twice, and no order takes much longer than a minute."""

import gc
import random

import pytest

from pipeline.labelling import work_plan
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.work_plan import Order, ShardOutcome, Step, StepOutcome, WorkPlan


def ended(step: Step, *, stop: int | None = None, seconds: float = 1.0, **about: object) -> StepOutcome:
    """How a step went, the whole of it unless `stop` says otherwise; nobody knows its shard's size here."""
    if isinstance(step, ShardJoin):
        return StepOutcome(shard=step.shard, stop=step.pieces[-1][1], published=True, seconds=seconds)
    assert step.stop is not None
    return StepOutcome(shard=step.shard, start=step.start, stop=stop or step.stop, seconds=seconds, **about)  # pyright: ignore[reportArgumentType]


def carry_out(plan: WorkPlan, clips: dict[str, int], order: Order, *, clips_per_second: float = 1e9) -> None:
    """Do what an actor does: cut at the bounds of batches of 2 once the time is over, publish what is whole."""
    left = order.seconds
    for step in order.steps:
        if left <= 0:
            break
        stop, whole = None, False
        if isinstance(step, ClipRange):
            assert step.stop is not None
            fitting = max(2, int(left * clips_per_second) // 2 * 2 + 2)
            stop = min(step.stop, step.start + fitting)
            whole = (step.start, stop) == (0, clips[step.shard])
            seconds = (stop - step.start) / clips_per_second
            plan.step_ended(order.number, ended(step, stop=stop, seconds=seconds, published=whole))
            left -= seconds
        else:
            plan.step_ended(order.number, ended(step))
    plan.order_ended(order.number)


def test_shards_are_given_in_ever_smaller_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {f"shard{number}": 10 for number in range(40)}
    plan = WorkPlan(clips, actors=2, batch_size=10)
    orders = []
    while order := plan.take():
        orders.append(order)
    assert [step.shard for order in orders for step in order.steps] == list(clips)
    assert [len(order.steps) for order in orders] == [10, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(work_plan, "_MAX_BATCHES", 2)
    small = WorkPlan(clips, actors=2, batch_size=10)
    assert [len(order.steps) for order in (small.take(), small.take()) if order] == [2, 2]
    assert WorkPlan({}, actors=3, batch_size=2).finished


def test_a_shard_of_any_size_is_cut_into_minutes_at_the_bounds_of_its_batches() -> None:
    clips = {"large": 1001}
    plan = WorkPlan(clips, actors=4, batch_size=2)
    orders: list[Order] = []
    while order := plan.take():
        carry_out(plan, clips, order, clips_per_second=0.5)
        orders.append(order)
    labelled = [step for order in orders for step in order.steps if isinstance(step, ClipRange)]
    assert plan.finished
    assert len(labelled) > 20
    assert all(step.start % 2 == 0 for step in labelled)
    assert all((step.stop or 0) - step.start <= 32 for step in labelled[1:])
    assert isinstance(orders[-1].steps[0], ShardJoin)
    assert orders[-1].steps[0].pieces[-1][1] == 1001
    [outcome] = plan.take_ended()
    assert (outcome.shard, outcome.clips, outcome.error) == ("large", 1001, "")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_every_clip_is_labelled_and_each_shard_ends_once(seed: int) -> None:
    draw = random.Random(seed)
    clips = {f"shard{number}": draw.randint(1, 300) for number in range(10)}
    plan = WorkPlan(clips, actors=3, batch_size=2, done={"shard0": [(0, 2), (0, 4), (2, 6)], "none": [(0, 2)]})
    outcomes: list[ShardOutcome] = []
    under_way: list[Order] = []
    while not plan.finished:
        if len(under_way) < 3 and (order := plan.take()):
            under_way.append(order)
        order = under_way.pop(draw.randrange(len(under_way)))
        match draw.randrange(4):
            case 0:
                plan.order_ended(order.number)  # it was silent
            case 1:
                plan.order_ended(order.number)
                carry_out(plan, clips, order)  # and then comes all the same
            case _:
                carry_out(plan, clips, order, clips_per_second=draw.choice([0.1, 1, 100]))
        outcomes += plan.take_ended()
    assert sorted(outcome.shard for outcome in outcomes) == sorted(clips)
    assert not [outcome for outcome in outcomes if outcome.error]
    assert plan.clips_done == sum(clips.values())


def test_shards_that_nobody_has_begun_or_that_have_ended_are_no_objects() -> None:
    clips = {f"shard{number}": 10 for number in range(3000)}
    gc.collect()
    before = len(gc.get_objects())
    plan = WorkPlan(clips, actors=2, batch_size=10)
    for _ in range(12):
        order = plan.take()
        assert order is not None
        carry_out(plan, clips, order)
        plan.take_ended()
    assert 1000 <= plan.clips_done / 10 < 2500
    assert len(gc.get_objects()) - before < 300


def test_what_failed_is_tried_once_more_when_nothing_else_is_left() -> None:
    clips = dict.fromkeys("abc", 4)
    plan = WorkPlan(clips, actors=1, batch_size=2)
    tried = []
    while order := plan.take():
        for step in order.steps:
            tried.append(step.shard)
            error = "storage" if step.shard == "a" or (step.shard == "b" and tried.count("b") == 1) else ""
            plan.step_ended(order.number, ended(step, published=True, error=error))
        plan.order_ended(order.number)
    assert tried == ["a", "b", "c", "a", "b"]
    assert [(one.shard, one.error) for one in plan.take_ended()] == [("c", ""), ("a", "storage"), ("b", "")]


def test_a_shard_that_kills_its_workers_is_given_up_and_takes_no_other_with_it() -> None:
    clips = {"deadly": 4, "good": 4, "better": 4}
    plan = WorkPlan(clips, actors=1, batch_size=2)
    while order := plan.take():
        if order.steps[0].shard == "deadly":
            plan.order_lost(order.number)
        else:
            carry_out(plan, clips, order)
    outcomes = {one.shard: one.error for one in plan.take_ended()}
    assert outcomes == {"deadly": "killed its worker 3 times; is there too little memory?", "good": "", "better": ""}


def test_what_an_earlier_run_labelled_is_not_done_again() -> None:
    plan = WorkPlan({"a": 10, "b": 4}, actors=1, batch_size=2, done={"a": [(2, 4), (6, 10)], "b": [(0, 2), (2, 4)]})
    steps: list[Step] = []
    while order := plan.take():
        steps += order.steps
    assert steps == [ClipRange("a", 0, 2), ClipRange("a", 4, 6), ShardJoin("b", ((0, 2), (2, 4)))]
    assert plan.clips_done == 10
