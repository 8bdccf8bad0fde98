"""Threads: results in order, and a thread that stands still is told."""

import os
import time

import pytest

from pipeline.errors import LostProcessError
from pipeline.runtime.threads import Threads


def test_results_come_in_the_order_of_their_items_and_items_are_asked_for_a_bounded_number_ahead() -> None:
    asked: list[int] = []

    def items():
        for number in range(30):
            asked.append(number)
            yield number

    with Threads(3, "square") as threads:
        results = threads.map(lambda number: number**2, items(), ahead=4)
        assert next(results) == (0, 0)
        assert len(asked) == 5
        assert [result for _, result in results] == [number**2 for number in range(1, 30)]


def test_what_the_work_raises_is_raised_at_its_items_turn() -> None:
    def invert(number: int) -> float:
        return 1 / number

    with Threads(2, "invert") as threads:
        results = threads.map(invert, [1, 2, 0, 4])
        assert [next(results), next(results)] == [(1, 1.0), (2, 0.5)]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_a_thread_that_stands_still_is_told_with_what_and_where_and_not_waited_for() -> None:
    reading, writing = os.pipe()
    started = time.monotonic()
    with pytest.raises(LostProcessError) as raised, Threads(1, "read", patience=0.5) as threads:
        list(threads.map(lambda descriptor: os.read(descriptor, 1), [reading], name=lambda _: "train-000003.tar"))
    assert time.monotonic() - started < 10
    assert "train-000003.tar: nothing has come of it for 0.5 s: it is at" in str(raised.value)
    assert "test_threads.py" in str(raised.value)
    os.close(writing)  # and the thread goes on, and ends


def test_a_thread_that_takes_long_but_does_something_is_waited_for() -> None:
    def slow() -> int:
        for _ in range(12):
            time.sleep(0.1)
        return 1

    with Threads(1, "slow", patience=0.6) as threads:
        assert threads.submit("slow", slow).result() == 1


def test_what_waits_behind_slow_work_is_waited_for() -> None:
    def slow() -> None:
        for _ in range(12):
            time.sleep(0.1)

    with Threads(1, "slow", patience=0.6) as threads:
        threads.submit("slow", slow)
        assert threads.submit("quick", lambda: 2).result() == 2


def test_a_thread_that_wakes_up_without_any_progress_is_told_by_the_sign_that_was_named() -> None:
    go_on, arrived = [True], [0]

    def wake_up() -> None:
        while go_on:
            time.sleep(0.05)

    def receive() -> int:
        for arrived[0] in range(12):
            time.sleep(0.1)
        return arrived[0]

    threads = Threads(1, "wait", patience=0.6)
    assert threads.submit("weights", receive, sign=lambda: arrived[0]).result() == 11
    with pytest.raises(LostProcessError, match=r"weights: nothing has come of it for 0\.6 s: it is at wake_up"):
        threads.submit("weights", wake_up, sign=lambda: arrived[0]).result()
    go_on.clear()
    threads.close()
