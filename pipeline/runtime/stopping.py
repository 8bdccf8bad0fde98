"""Ctrl-C and SIGTERM as a request: the work in hand is finished and saved before the process ends.

A command that was stopped exits with 128 and the signal's number, as shells have it: whoever started it must not take
it for finished.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_EVENTS: list[threading.Event] = []
_SIGNALS: list[signal.Signals] = []
"""The last one that asked this process to end."""


class StopRequestedError(Exception):
    """Raised between two items of a `StopRequest.guard`, once somebody wants the process to end."""


class StoppedError(Exception):
    """A command ended early because it was asked to. It has said so, and all that it did is saved."""


def stopping_signal(default: signal.Signals) -> signal.Signals:
    """Returns which signal asked this process to end; the default where the request came from another process."""
    return _SIGNALS[-1] if _SIGNALS else default


def asked_to_stop() -> bool:
    """Whether a signal or an event of `stop_on_event` asked this process to end."""
    return bool(_SIGNALS) or any(event.is_set() for event in _EVENTS)


class StopRequest:
    """Whether somebody asked the process to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether the end was asked for, by a signal or by an event of `stop_on_event`."""
        return self._event.is_set() or any(event.is_set() for event in _EVENTS)

    def ask(self) -> None:
        """Ask for the end."""
        self._event.set()

    def guard(self, items: Iterable[T]) -> Iterator[T]:
        """Go through `items` until the end is asked for.

        Raises:
            StopRequestedError: it was asked for, and an item was left.
        """
        for item in items:
            if self.requested:
                raise StopRequestedError
            yield item


@contextmanager
def stop_on_signals(*, at_once: bool = False) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request while the block runs; a second SIGINT interrupts at once.

    Outside the main thread, where Python can't take signals, only an event of `stop_on_event` makes the request.

    Args:
        at_once: interrupt with the first signal, for work that may be left in the middle. The request is made all the
            same: an exception that a signal raises while a library's callback or destructor runs is swallowed there.

    Raises:
        KeyboardInterrupt: a second SIGINT, or with `at_once` any.
    """
    request = StopRequest()
    _SIGNALS.clear()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.requested and number == signal.SIGINT
        _SIGNALS[:] = [signal.Signals(number)]
        request.ask()
        if at_once or again:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_event(event: threading.Event) -> Iterator[None]:
    """Let an event ask this process's work to end, as a signal does, while the block runs."""
    _EVENTS.append(event)
    try:
        yield
    finally:
        _EVENTS.remove(event)
