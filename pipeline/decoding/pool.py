"""Processes that read and decode for this one: they start without copying it, and none is waited for without a limit.

Each is a new Python (`pipeline.decoding.worker`) on a pair of pipes. Requests go to them in turn, results come back in
the order of the requests, and their arrays lie in memory that both sides map. A process that dies, or gives no sign of
life for too long, ends whoever waits for it with one line that says which one it was and where it stood.
"""

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np

from pipeline.decoding.messages import Begin, Channel, Do, Done, Failed, Forget, Learn
from pipeline.decoding.shared_memory import Arena, Blocks, SharedFile, share_object
from pipeline.decoding.worker import Reader
from pipeline.errors import LostProcessError
from pipeline.runtime.stopping import StopRequestedError
from pipeline.runtime.watching import (
    LOOK_SECONDS,
    PATIENCE_SECONDS,
    Watch,
    how_it_ended,
    innermost_call,
    where_it_stands,
)

_AHEAD = 2
"""Requests that each process has at once: one that it works on, and the next."""
_HELD = 2
"""Results that whoever asked may hold without a copy being made: the last one and the one before."""
_END_SECONDS = 5.0
"""How long a killed process may take to go; if it is still there, the kernel holds it, and nobody can do more."""
_COMMAND = "from pipeline.decoding.worker import main; main()"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_log = logging.getLogger(__name__)


class DecodingPool:
    """Some processes, for as long as the `with` block lasts; for one thread.

    Args:
        processes: how many; with 0 the work is done in this process when a result is asked for.
        patience: how long one of them may be waited for without a sign of life, in seconds, where that is a command's
            `--patience`; each clip is one. None is 300 s.
        interrupted: asked while waiting, whether to give up.
        remedy: what to do where there is no memory for that many, for the message.

    Raises:
        LostProcessError: one can't be started.
    """

    def __init__(
        self,
        processes: int,
        *,
        patience: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        remedy: str = "Give the machine more memory, or take fewer --workers",
    ) -> None:
        self._patience = PATIENCE_SECONDS if patience is None else patience
        self._patience_flag = "" if patience is None else ", or allow more by --patience"
        self._interrupted, self._remedy = interrupted, remedy
        self._tickets = itertools.count()
        self._orders: dict[int, _Order] = {}
        self._ended: list[_Worker] = []
        self._news: SimpleQueue[None] = SimpleQueue()
        self._known: dict[int, tuple[Reader, SharedFile]] = {}
        self._dumps = SharedFile(0)
        self._signs_file = SharedFile(16 * max(processes, 1))
        self._signs = np.frombuffer(self._signs_file.map(), np.int64).reshape(-1, 2)
        self._workers: list[_Worker] = []
        try:
            for number in range(processes):
                begin = Begin(number, self._signs_file.path, self._dumps.path)
                self._workers.append(_Worker(begin, self._receive))
        except OSError as error:
            self.close()
            raise LostProcessError(
                f"can't start decoding process {number + 1} of {processes} ({error.strerror or error}). {remedy}"
            ) from error

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    def load(
        self,
        reader: Reader,
        requests: Iterable[Any],
        *,
        processes: int | None = None,
        receive: Callable[[Any], Any] | None = None,
    ) -> Iterator[Any]:
        """Returns the result of each request, in their order, some of them made ahead of time.

        Several such iterations may be under way. A result's arrays are the very ones that the process wrote, unless
        more than two results are held: then they are copies.

        Args:
            reader: does the work.
            requests: asked for as there is room for their results; none has a larger result than the first one.
            processes: how many of the processes take them in turn; None is all.
            receive: makes of a result what is given instead, early and in a thread; it keeps no array of the result.

        Raises:
            LostProcessError: a process died or does not answer.
            StopRequestedError: `interrupted` said so while a result was waited for.
        """
        if not self._workers:
            for request in requests:
                result = reader.load(request, Arena(), lambda row: None)
                yield result if receive is None else receive(result)
            return
        load = _Load(self, reader, requests, self._workers[:processes], receive)
        try:
            yield from load.results()
        finally:
            load.close()

    def learn(self, reader: Reader) -> int:
        """Tell all processes a reader, once; give its number."""
        number = id(reader)
        if number not in self._known:
            packed, file = share_object(reader)
            self._known[number] = reader, file
            for worker in self._workers:
                worker.send(Learn(number, packed, file.path))
        return number

    def order(self, load: "_Load", worker: "_Worker", request: Any, offset: int) -> "_Order":
        """Send a request to a process."""
        blocks = load.blocks
        order = _Order(next(self._tickets), load, worker, offset)
        self._orders[order.ticket] = order
        number = self.learn(load.reader)
        worker.send(Do(order.ticket, number, request, blocks.file.path, offset, blocks.size))
        return order

    def forget(self, load: "_Load", orders: Iterable["_Order"]) -> None:
        """Drop an iteration's requests and its memory, whatever still comes."""
        for order in orders:
            self._orders.pop(order.ticket, None)
        for worker in self._workers:
            worker.send(Forget(load.blocks.file.path))

    def wait_for(self, order: "_Order") -> None:
        """Wait for the answer to a request, within the limits."""
        watch = Watch(self._patience)
        while not self._ended:
            if order.is_answered:
                return
            if self._interrupted():
                raise StopRequestedError
            watch.see(self._signs[order.worker.number].tolist())
            if watch.expired:
                raise self._stuck(order)
            with suppress(Empty):
                self._news.get(timeout=min(LOOK_SECONDS, self._patience))
        raise self._died(self._ended[0], order.load.reader)

    def _receive(self, worker: "_Worker", answer: Done | Failed | None) -> None:
        """Take what comes from a process; called by its thread. None is its end."""
        if answer is None:
            self._ended.append(worker)
        elif (order := self._orders.pop(answer.ticket, None)) is not None:
            order.take(answer)
        self._news.put(None)

    def _stuck(self, order: "_Order") -> LostProcessError:
        worker = order.worker
        where, dump = where_it_stands(worker.process.pid, self._read_dumps())
        if dump:
            _log.warning("decoding process %d of %d stands at\n%s", worker.number + 1, self.size, dump)
        what = f"has given no sign of life for {self._patience:g} s"
        return self._lost(worker, what, where, order.load.reader, f"Mend what it waits for{self._patience_flag}")

    def _died(self, worker: "_Worker", reader: Reader) -> LostProcessError:
        worker.wait(_END_SECONDS)
        code = worker.process.returncode
        where = innermost_call(self._dumps.read_from(0).decode(errors="replace"))
        remedy = "Take that clip out of the dataset" if where else self._remedy
        return self._lost(worker, how_it_ended(code), where, reader, remedy)

    def _lost(self, worker: "_Worker", what: str, where: str, reader: Reader, remedy: str) -> LostProcessError:
        count, row = self._signs[worker.number].tolist()
        clip = f"; its clip is {reader.name_of(row)}" if count else ""
        return LostProcessError(
            f"decoding process {worker.number + 1} of {self.size} (process {worker.process.pid}) {what}"
            f"{f': {where}' if where else ''}{clip}. {remedy}"
        )

    def _read_dumps(self) -> Callable[[], bytes]:
        offset = 0

        def read() -> bytes:
            nonlocal offset
            content = self._dumps.read_from(offset)
            offset += len(content)
            return content

        return read

    def close(self) -> None:
        """End the processes at once, whatever they do: they hold nothing that would have to be saved."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            if not worker.wait(_END_SECONDS):
                _log.warning("process %d was killed, but the kernel still holds it", worker.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process, and the two threads that talk with it, so that nobody else waits for its pipes."""

    def __init__(self, begin: Begin, receive: Callable[["_Worker", Done | Failed | None], None]) -> None:
        self.number = begin.number
        # Its modules are found where this process finds them. Signals that are meant for this process reach children
        # too, by Ctrl-C or from a service manager; if they died of them, this one could not finish its step and save.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with _signals_blocked():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
            )
        self._channel = Channel(cast("BinaryIO", self.process.stdout), cast("BinaryIO", self.process.stdin))
        self._outgoing: SimpleQueue[object] = SimpleQueue()
        self._receive = receive
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name=f"decoding {self.number}", daemon=True).start()
        self.send(begin)

    def send(self, message: object) -> None:
        self._outgoing.put(message)

    def kill(self) -> None:
        self.process.kill()
        self._outgoing.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; False where it does not come."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _send_all(self) -> None:
        with suppress(OSError, ValueError):  # its end is told by the other thread
            while (message := self._outgoing.get()) is not None:
                self._channel.send(message)
        self._channel.close()

    def _receive_all(self) -> None:
        with suppress(EOFError, OSError, ValueError):
            while True:
                self._receive(self, self._channel.receive())
        self._receive(self, None)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep SIGINT and SIGTERM from this thread for a moment, and from a process started meanwhile for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Load:
    """One iteration over requests."""

    def __init__(
        self,
        pool: DecodingPool,
        reader: Reader,
        requests: Iterable[Any],
        workers: list[_Worker],
        receive: Callable[[Any], Any] | None,
    ) -> None:
        self.reader, self.receive = reader, receive
        self._pool, self._requests = pool, iter(requests)
        self._turn = itertools.cycle(workers)
        self._most = _AHEAD * len(workers)
        self._orders: deque[_Order] = deque()
        self._blocks: Blocks | None = None

    @property
    def blocks(self) -> Blocks:
        assert self._blocks is not None
        return self._blocks

    def results(self) -> Iterator[Any]:
        self._fill()
        while self._orders:
            order = self._orders.popleft()
            self._pool.wait_for(order)
            self._fill()
            yield order.result()
            self._fill()

    def _fill(self) -> None:
        """Send requests as long as there is room for their results."""
        while len(self._orders) < self._most:
            offset = None if self._blocks is None else self._blocks.take()
            if self._blocks is not None and offset is None:
                return
            try:
                request = next(self._requests)
            except StopIteration:
                if offset is not None:
                    self.blocks.give_back(offset)
                return
            if offset is None:
                self._blocks = Blocks(self._most + _HELD, self.reader.result_bytes(request))
                offset = cast("int", self._blocks.take())
            self._orders.append(self._pool.order(self, next(self._turn), request, offset))

    def close(self) -> None:
        if self._blocks is not None:
            self._pool.forget(self, self._orders)


@dataclass(slots=True, eq=False)
class _Order:
    """A request on its way."""

    ticket: int
    load: _Load
    worker: _Worker
    offset: int
    """Of the block for its result."""
    is_answered: bool = False
    _answer: Done | Failed | None = None
    _received: Any = None

    def take(self, answer: Done | Failed) -> None:
        """Note the answer; called by the process's thread."""
        blocks, receive = self.load.blocks, self.load.receive
        if isinstance(answer, Done) and receive is not None:
            self._received = receive(answer.result.unpack(blocks.view(self.offset)))
            blocks.give_back(self.offset)
        self._answer, self.is_answered = answer, True

    def result(self) -> Any:
        """Returns what came of it, or raise it."""
        blocks, answer = self.load.blocks, self._answer
        if isinstance(answer, Failed):
            blocks.give_back(self.offset)
            answer.error.add_note(answer.trace)
            raise answer.error
        assert answer is not None
        if self.load.receive is not None:
            return self._received
        if blocks.lent < _HELD:
            return answer.result.unpack(blocks.lend(self.offset))
        copied = bytearray(blocks.view(self.offset))
        blocks.give_back(self.offset)
        return answer.result.unpack(copied)
