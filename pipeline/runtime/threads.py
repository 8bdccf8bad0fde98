"""Threads for work that reads or copies, and so lets go of Python's lock meanwhile.

Unlike those of `concurrent.futures`, whoever waits is told when one of them stands still, and the process can end
without it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pipeline.errors import LostProcessError
from pipeline.runtime.watching import LOOK_SECONDS, PATIENCE_SECONDS, Watch, call_of_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """Some threads, for as long as the `with` block lasts.

    Args:
        count: how many.
        name: what they do, for people.
        patience: how long one may be waited for that neither computes nor reads anything, in seconds; None is 300 s.
    """

    def __init__(self, count: int, name: str, *, patience: float | None = None) -> None:
        self.patience = PATIENCE_SECONDS if patience is None else patience
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, what: str, work: Callable[[], Result], *, sign: Callable[[], object] | None = None
    ) -> "Job[Result]":
        """Have something done by the next thread that is free.

        Args:
            what: names it in messages.
            work: does it.
            sign: gives what changes while there is progress, where a thread that does anything is no sign of that.
        """
        job = Job(what, work, self, sign)
        self._jobs.put(job)
        return job

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        name: Callable[[Item], str] = str,
        ahead: int | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Yields (item, result) in the items' order.

        Args:
            function: called in the threads.
            items: asked for a bounded number ahead.
            name: of an item, for messages.
            ahead: how many results may be there before they are asked for; four for each thread unless given.

        Raises:
            LostProcessError: a thread stands still. Whatever else `function` raises is raised at its item's turn.
        """
        jobs: deque[tuple[Item, Job[Result]]] = deque()
        limit = 4 * len(self._threads) if ahead is None else ahead
        for item in items:
            jobs.append((item, self.submit(name(item), lambda item=item: function(item))))
            if len(jobs) > limit:
                first, job = jobs.popleft()
                yield first, job.result()
        while jobs:
            first, job = jobs.popleft()
            yield first, job.result()

    def signs_of_life(self) -> object:
        """Returns what changes whenever one of the threads has done anything."""
        return [sign_of_life(thread) for thread in self._threads]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._closed:
                job.do()
            del job  # what it holds is not needed until the next one comes

    def leave(self) -> None:
        """Begin nothing more, and don't wait for what is under way: that ends with the process at the latest."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way, unless a thread stands still."""
        self.leave()
        for thread in self._threads:
            watch = Watch(self.patience)
            while thread.is_alive() and not watch.expired:
                thread.join(LOOK_SECONDS)
                watch.see(sign_of_life(thread))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LostProcessError):  # it was waited for long enough
            self.patience = 0.0
        self.close()


class Job(Generic[Result]):
    """Something that a thread does; from `Threads.submit`."""

    def __init__(
        self, what: str, work: Callable[[], Result], threads: Threads, sign: Callable[[], object] | None
    ) -> None:
        self._what, self._work, self._threads, self._sign = what, work, threads, sign
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or what went wrong."""
        return self._done.is_set()

    def do(self) -> None:
        """Do it; called by the thread."""
        self._thread = threading.current_thread()
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def result(self) -> Result:
        """Wait for what comes of it, and return that, or raise it.

        Raises:
            LostProcessError: its thread stands still.
        """
        patience = self._threads.patience
        watch = Watch(patience)
        while not self._done.wait(min(LOOK_SECONDS, patience)):
            watch.see(self._sign_of_life())
            if watch.expired:
                raise LostProcessError(
                    f"{self._what}: nothing has come of it for {patience:g} s{self._where()}. Mend what it waits for, "
                    "such as a disk or network share that does not answer"
                )
        if self._error is not None:
            raise self._error
        return self._result  # pyright: ignore[reportReturnType]

    def _sign_of_life(self) -> object:
        if self._thread is None:
            return self._threads.signs_of_life()
        return sign_of_life(self._thread) if self._sign is None else self._sign()

    def _where(self) -> str:
        return f": {call_of_thread(self._thread.ident or 0)}" if self._thread else "; no thread was free for it"


def sign_of_life(thread: threading.Thread) -> object:
    """Returns what changes whenever a thread has done anything at all, be it waking up for another byte.

    Only Linux tells; elsewhere a thread always seems to live.
    """
    try:
        return Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text(encoding="utf-8")
    except OSError:
        return time.monotonic()
