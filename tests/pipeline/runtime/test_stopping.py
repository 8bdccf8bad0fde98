import os
import signal

import pytest

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
