"""What the board tells: each order to one actor, each event once, and nothing of an answer that got lost."""

import pytest

from pipeline.labelling.clip_range import ClipRange
from pipeline.labelling.work_plan import Order, StepOutcome

pytestmark = pytest.mark.ray

OUTCOME = StepOutcome(shard="a", stop=2, published=True)


def order(number: int) -> Order:
    return Order(number=number, steps=(ClipRange("a", 0, 2),), seconds=1.0, tries=1)


def test_orders_are_fetched_once_also_where_the_driver_sends_them_again() -> None:
    from pipeline.labelling.work_board import WorkBoard

    board = WorkBoard()
    state = board.exchange([order(1), order(2)], "", 0)
    assert state.waiting == {1, 2}
    assert board.fetch(7) == (True, order(1))
    assert board.exchange([order(1), order(2)], state.generation, 0).waiting == {2}
    assert board.fetch(8) == (True, order(2))
    assert board.fetch(9) == (True, None)
    board.stop()
    assert board.fetch(9) == (False, None)


def test_events_stay_until_the_driver_has_read_them() -> None:
    from pipeline.labelling.work_board import Event, WorkBoard

    board = WorkBoard()
    board.step(7, 1, OUTCOME)
    state = board.exchange([], "", 0)
    assert state.events == [Event("step", 1, OUTCOME)]
    assert board.exchange([], "", 0).events == state.events, "an answer that got lost comes again"
    board.ended(7, 1)
    later = board.exchange([], state.generation, state.last_event)
    assert later.events == [Event("ended", 1)]
    assert board.exchange([], state.generation, state.last_event).events == later.events
    assert board.exchange([], later.generation, later.last_event).events == []
    assert WorkBoard().exchange([], later.generation, later.last_event).events == [], "of another board"


def test_what_a_worker_had_in_hand_when_it_died_is_told() -> None:
    from pipeline.labelling.work_board import Event, WorkBoard

    board = WorkBoard()
    board.hello(7)
    board.exchange([order(1)], "", 0)
    board.fetch(7)
    board.hello(7)
    assert board.exchange([], "", 0).events == [Event("lost", 1)]
    board.hello(7)
    assert len(board.exchange([], "", 0).events) == 1
