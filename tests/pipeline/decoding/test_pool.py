"""Decoding processes: whatever becomes of one of them, whoever waits for it is told, and none is left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, cast

import psutil
import pytest
from own_children import decoding_processes
from toy_reader import KILLED, LOST_IN_A_CALL, REFUSED, SLOW, STOPPED, UNSPEAKABLE, Answer, ToyReader

from pipeline.decoding.messages import Begin, Channel
from pipeline.decoding.pool import DecodingPool
from pipeline.errors import LostProcessError
from pipeline.runtime.stopping import StopRequestedError

SOME = [[number, number + 1, number + 2] for number in range(12)]


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = {child.pid for child in decoding_processes()}
    yield
    assert {child.pid for child in decoding_processes()} <= before


def firsts(answers: list[Answer]) -> list[list[int]]:
    return [answer.squares[:, 0].tolist() for answer in answers]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_their_requests(processes: int) -> None:
    with DecodingPool(processes) as pool:
        answers = list(pool.load(ToyReader(), SOME))
    assert firsts(answers) == [[number**2 for number in request] for request in SOME]
    assert len({answer.process for answer in answers}) == max(processes, 1)


def test_results_that_are_held_stay_as_they_are_whatever_comes_after() -> None:
    with DecodingPool(1) as pool:
        held = [answer.squares for answer in pool.load(ToyReader(), SOME)]
        list(pool.load(ToyReader(), [[900]] * 8))
    assert [squares[0, 0] for squares in held] == [request[0] ** 2 for request in SOME]


def test_requests_are_asked_for_only_as_far_as_there_is_room() -> None:
    asked: list[int] = []

    def requests() -> Iterator[list[int]]:
        for number in count():
            asked.append(number)
            yield [number % 1000]

    with DecodingPool(2) as pool:
        answers = pool.load(ToyReader(), requests())
        assert len(list(islice(answers, 10))) == 10
        assert len(asked) <= 15
        assert firsts(list(pool.load(ToyReader(), SOME))) == [[number**2 for number in request] for request in SOME]
        assert next(answers).squares[0, 0] == 100  # two iterations are under way side by side


def test_what_is_received_early_is_given_in_order_too() -> None:
    threads: set[int] = set()

    def receive(answer: Answer) -> int:
        threads.add(threading.get_ident())
        return int(answer.squares.sum())

    with DecodingPool(2) as pool:
        sums = list(pool.load(ToyReader(), SOME, receive=receive))
    assert sums == [100 * sum(number**2 for number in request) for request in SOME]
    assert threading.get_ident() not in threads


def test_processes_share_a_reader_s_arrays() -> None:
    reader = ToyReader(size=20_000_000)  # 160 MB
    with DecodingPool(2) as pool:
        list(pool.load(reader, [[number] for number in range(0, 20_000_000, 100_000)]))
        for child in decoding_processes():
            assert child.memory_full_info().uss < 60_000_000


def test_a_process_needs_neither_torch_nor_arrow() -> None:
    with DecodingPool(1) as pool:
        [answer] = pool.load(ToyReader(), [[1]])
    assert not answer.modules & {"torch", "pyarrow", "pandas", "ray"}


def test_a_process_that_is_killed_is_named_within_seconds() -> None:
    started = time.monotonic()
    with DecodingPool(2) as pool, pytest.raises(LostProcessError) as raised:
        list(pool.load(ToyReader(), [[1], [2], [3], [7, KILLED], [5], [6]]))
    assert time.monotonic() - started < 5
    assert "decoding process 2 of 2 (process " in str(raised.value)
    assert "was killed (SIGKILL), as the kernel does it when memory runs out" in str(raised.value)
    assert "its clip is number -1" in str(raised.value)
    assert "fewer --workers" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_process_that_is_killed_while_nobody_waits_is_told_when_it_is_needed() -> None:
    with DecodingPool(1) as pool:
        list(pool.load(ToyReader(), SOME))
        [child] = decoding_processes()
        child.kill()
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(LostProcessError, match="SIGKILL"):
            list(pool.load(ToyReader(), SOME))


def test_a_process_that_is_stopped_is_told_and_ended() -> None:
    with DecodingPool(2, patience=1) as pool, pytest.raises(LostProcessError) as raised:
        list(pool.load(ToyReader(), [[1], [STOPPED], [3]]))
    assert "has given no sign of life for 1 s: it is stopped, by SIGSTOP" in str(raised.value)
    assert str(raised.value).endswith("Mend what it waits for, or allow more by --patience")


def test_a_command_without_patience_does_not_advise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decoding.pool.PATIENCE_SECONDS", 1)
    with DecodingPool(1) as pool, pytest.raises(LostProcessError, match=r"for 1 s: .*\. Mend what it waits for$"):
        list(pool.load(ToyReader(), [[1], [STOPPED]]))


def test_a_process_that_hangs_says_where(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        DecodingPool(1, patience=1) as pool,
        pytest.raises(LostProcessError) as raised,
    ):
        list(pool.load(ToyReader(), [[1], [LOST_IN_A_CALL]]))
    assert "it is at wait_for_ever (tests/pipeline/toy_reader.py:" in str(raised.value)
    assert "in trouble" in caplog.text  # the whole stack


def test_a_process_that_takes_long_but_goes_on_is_waited_for() -> None:
    with DecodingPool(1, patience=0.8) as pool:
        [answer] = pool.load(ToyReader(), [[SLOW] * 5])
    assert len(answer.squares) == 5


def test_a_crash_says_in_which_call(tmp_path: Path) -> None:
    with DecodingPool(1) as pool:
        answers = pool.load(ToyReader(), [[1], [SLOW, SLOW], [1]])
        next(answers)
        [child] = decoding_processes()
        time.sleep(0.2)
        child.send_signal(signal.SIGSEGV)
        with pytest.raises(LostProcessError, match=r"was ended by SIGSEGV: it is at trouble \(.*toy_reader.py:\d+\)"):
            list(answers)


@pytest.mark.parametrize(("number", "kind"), [(REFUSED, ValueError), (UNSPEAKABLE, RuntimeError)])
def test_what_the_work_raises_is_raised_at_its_turn_and_others_go_on(number: int, kind: type[Exception]) -> None:
    with DecodingPool(1) as pool:
        answers = pool.load(ToyReader(), [[1], [number], [3]])
        assert next(answers).squares[0, 0] == 1
        with pytest.raises(kind) as raised:
            next(answers)
        assert "toy_reader.py" in "".join(raised.value.__notes__)
        assert len(list(pool.load(ToyReader(), SOME))) == len(SOME)


def test_whoever_waits_can_be_interrupted() -> None:
    wanted = time.monotonic() + 1
    with DecodingPool(1, interrupted=lambda: time.monotonic() > wanted) as pool, pytest.raises(StopRequestedError):
        list(pool.load(ToyReader(), [[LOST_IN_A_CALL]]))
    assert time.monotonic() < wanted + 3


def test_a_request_larger_than_a_pipe_holds_waits_for_nobody() -> None:
    with DecodingPool(1, patience=1) as pool:
        answers = pool.load(ToyReader(), [[1] * 10, [STOPPED], [1] * 1_000_000])
        with pytest.raises(LostProcessError):
            list(answers)


def test_signals_for_the_process_that_wants_the_work_leave_its_helpers_alone() -> None:
    with DecodingPool(2) as pool:
        for child in decoding_processes():  # they may not even have begun
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        assert len(list(pool.load(ToyReader(), SOME))) == len(SOME)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_they_work_for(end: signal.Signals) -> None:
    program = """
import os, time
from pipeline.decoding.pool import DecodingPool
from toy_reader import LOST_IN_A_CALL, ToyReader
pool = DecodingPool(2)
answers = pool.load(ToyReader(), [[1], [2], [LOST_IN_A_CALL], [LOST_IN_A_CALL]])
next(answers), next(answers)
print(*(worker.process.pid for worker in pool._workers), flush=True)
next(answers)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        helpers = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
        assert len(helpers) == 2
        process.send_signal(end)
        assert process.wait(10) == -end
    psutil.wait_procs(helpers, timeout=10)
    assert not any(helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE for helper in helpers)


@pytest.mark.parametrize("first", [[], [Begin(number=0, signs="/proc/0/fd/0", dumps="/proc/0/fd/0")]])
def test_a_process_whose_master_is_killed_before_it_has_begun_ends_without_a_word(first: list[Begin]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", "from pipeline.decoding.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for message in first:  # the master's files are gone already, as those of a killed process are
            Channel(cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin)).send(message)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, b"")


def test_what_can_not_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LostProcessError, match=r"can't start decoding process 1 of 2 \(No such file.*fewer --workers"):
        DecodingPool(2)


def test_a_process_that_is_slow_to_start_is_waited_for() -> None:
    with DecodingPool(1, patience=1) as pool:
        [child] = decoding_processes()
        child.suspend()
        threading.Timer(2.5, child.resume).start()
        assert firsts(list(pool.load(ToyReader(), SOME[:1]))) == [[0, 1, 4]]


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decoding.pool._START_SECONDS", 1)
    with DecodingPool(1, patience=0.1) as pool:
        [child] = decoding_processes()
        child.suspend()
        with pytest.raises(LostProcessError, match="no sign of life for 1 s: it is stopped"):
            list(pool.load(ToyReader(), SOME))
