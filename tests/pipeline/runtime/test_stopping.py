import os
import signal
from pathlib import Path

import pytest
from made_command import run_command

from pipeline.runtime.stopping import StopRequest, StopRequestedError, stop_on_signals


def work(stop: StopRequest, done: list[int], number: signal.Signals) -> None:
    for item in stop.guard(range(5)):
        done.append(item)
        if item == 1:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_between_two_items(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []
    with stop_on_signals() as stop, pytest.raises(StopRequestedError):
        work(stop, done, number)
    assert done == [0, 1]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_at_once_is_remembered_where_a_library_swallows_it(number: signal.Signals) -> None:
    with stop_on_signals(at_once=True) as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stop.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_started_a_command_sees_that_it_was_stopped_and_by_which_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    stopped = "import os, signal\nfrom pipeline.runtime.stopping import stop_on_signals\n"
    at_once = f"{stopped}with stop_on_signals(at_once=True):\n    os.kill(os.getpid(), {number})"
    done = run_command(at_once, tmp_path=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, "error: stopped; the same command goes on from here\n")
    saved = f"""{stopped}
class Result:
    finished = False
with stop_on_signals():
    os.kill(os.getpid(), {number})
return Result()"""
    done = run_command(saved, tmp_path=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, "")


def test_a_command_that_another_process_asked_to_stop_was_stopped_too(tmp_path: Path) -> None:
    body = "class Result:\n    finished = False\nreturn Result()"
    assert run_command(body, tmp_path=tmp_path).returncode == 143
