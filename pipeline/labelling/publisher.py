"""A thread that publishes what was labelled, in its order, while whoever labels goes on."""

import math
import threading
from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import Self

from pipeline.labelling.work_plan import StepOutcome
from pipeline.runtime.threads import Job, Threads, sign_of_life


class Publisher:
    """Publishes one step at a time; who labels is at most one step ahead, so that what waits stays small.

    A storage that does not answer is the affair of whoever looks for signs of life: `sign` stands still with it.
    """

    def __init__(self) -> None:
        self._threads = Threads(1, "publish", patience=math.inf)
        self._last: Job[StepOutcome | None] | None = None
        self._waiting_since: float | None = None
        self._owner = threading.current_thread()

    def submit(self, what: str, work: Callable[[], StepOutcome | None]) -> None:
        """Have something published, once all before it is."""
        self._last = self._threads.submit(what, work)

    def wait(self) -> StepOutcome | None:
        """Wait until all is published; returns the outcome of the last one.

        Raises:
            Exception: what it raised.
        """
        last, self._last = self._last, None
        if last is None:
            return None
        self._waiting_since = perf_counter()
        try:
            return last.result()
        finally:
            self._waiting_since = None

    @property
    def held_up_seconds(self) -> float:
        """How long whoever labels has been waiting by now."""
        since = self._waiting_since
        return 0.0 if since is None else perf_counter() - since

    def sign(self) -> object:
        """Returns what changes whenever whoever labels does anything, or while he waits, whoever publishes."""
        return sign_of_life(self._owner) if self._waiting_since is None else self._threads.signs_of_life()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish what is left, unless something went wrong, and let the thread end."""
        try:
            if error is None:
                self.wait()
        finally:
            self._threads.leave()
