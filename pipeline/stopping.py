"""Ctrl-C and SIGTERM as a request: the work in hand is finished and saved before the process ends."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class StopRequestedError(Exception):
    """Raised between two items of a `StopRequest.guard`, once somebody wants the process to end."""


class StopRequest:
    """Whether somebody asked the process to end."""

    def __init__(self) -> None:
        self.requested = False

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
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request while the block runs; a second SIGINT interrupts at once.

    Outside the main thread, where Python can't take signals, the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
