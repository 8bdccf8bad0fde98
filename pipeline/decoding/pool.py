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
_START_SECONDS = 60.0
"""How long a process may at least take until its first clip, no silence: a busy machine starts one slowly."""
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
        self._orders: dict[int, Order] = {}
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

    @property
    def ahead(self) -> int:
        """How many requests of an iteration that all processes work at are on their way."""
        return _AHEAD * len(self._workers)

    def load(
        self,
        reader: Reader,
        requests: Iterable[Any],
        *,
        processes: int | None = None,
        receive: Callable[[Any], Any] | None = None,
    ) -> Iterator[Any]:
        """Returns the result of each request, in their order, made ahead of time, the first ones from now on.

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
        asked = iter(requests)
        if not self._workers:
            return _made_here(reader, asked, receive)
        for first in asked:
            ahead = _AHEAD * len(self._workers[:processes])
            queue = self.open_queue(
                reader, ahead, reader.result_bytes(first), held=_HELD, processes=processes, receive=receive
            )
            return queue.results(itertools.chain([first], asked), ahead)
        return iter(())

    def open_queue(
        self,
        reader: Reader,
        ahead: int,
        result_bytes: int,
        *,
        held: int,
        processes: int | None = None,
        receive: Callable[[Any], Any] | None = None,
    ) -> "RequestQueue":
        """Returns a queue for requests to a reader, for whoever wants to choose when to make them.

        Args:
            reader: does the work.
            ahead: how many requests may be on their way.
            result_bytes: memory for the arrays of a result; those of a larger one come through a pipe, which is slower.
            held: results that whoever asks may hold without a copy being made.
            processes: as for `load`.
            receive: as for `load`.
        """
        workers = self._workers[:processes]
        return RequestQueue(self, reader, workers, Blocks(ahead + held, result_bytes), held=held, receive=receive)

    def learn(self, reader: Reader) -> int:
        """Tell all processes a reader, once; give its number."""
        number = id(reader)
        if number not in self._known:
            packed, file = share_object(reader)
            self._known[number] = reader, file
            for worker in self._workers:
                worker.send(Learn(number, packed, file.path))
        return number

    def order(self, queue: "RequestQueue", worker: "_Worker", request: Any, offset: int) -> "Order":
        """Send a request to a process."""
        blocks = queue.blocks
        order = Order(next(self._tickets), queue, worker, offset)
        number = self.learn(queue.reader)
        self._orders[order.ticket] = order
        worker.send(Do(order.ticket, number, request, blocks.file.path, offset, blocks.size))
        return order

    def forget(self, queue: "RequestQueue") -> None:
        """Drop a queue's requests and its memory, whatever still comes."""
        for order in [order for order in list(self._orders.values()) if order.queue is queue]:
            self._orders.pop(order.ticket, None)
        for worker in self._workers:
            worker.send(Forget(queue.blocks.file.path))

    def wait_for(self, order: "Order") -> None:
        """Wait for the answer to a request, within the limits."""
        watch = Watch(self._patience)
        while not order.is_answered:
            if self._ended:
                raise self._died(self._ended[0], order.queue.reader)
            if self._interrupted() or order.queue.is_closed:
                raise StopRequestedError
            count, row = self._signs[order.worker.number].tolist()
            watch.see((count, row))
            limit = self._patience if count else max(self._patience, _START_SECONDS)
            if watch.longer_than(limit):
                raise self._stuck(order, limit)
            with suppress(Empty):
                self._news.get(timeout=min(LOOK_SECONDS, self._patience))

    def _receive(self, worker: "_Worker", answer: Done | Failed | None) -> None:
        """Take what comes from a process; called by its thread. None is its end."""
        if answer is None:
            self._ended.append(worker)
        elif (order := self._orders.pop(answer.ticket, None)) is not None:
            order.take(answer)
        self._news.put(None)

    def _stuck(self, order: "Order", limit: float) -> LostProcessError:
        worker = order.worker
        where, dump = where_it_stands(worker.process.pid, self._read_dumps())
        if dump:
            _log.warning("decoding process %d of %d stands at\n%s", worker.number + 1, self.size, dump)
        what = f"has given no sign of life for {limit:g} s"
        return self._lost(worker, what, where, order.queue.reader, f"Mend what it waits for{self._patience_flag}")

    def _died(self, worker: "_Worker", reader: Reader) -> LostProcessError:
        worker.wait(_END_SECONDS)
        code = worker.process.returncode
        where = innermost_call(self._dumps.read_from(0).decode(errors="replace"))
        remedy = "Leave that clip out" if where else self._remedy
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


def _made_here(reader: Reader, requests: Iterator[Any], receive: Callable[[Any], Any] | None) -> Iterator[Any]:
    for request in requests:
        result = reader.load(request, Arena(), lambda row: None)
        yield result if receive is None else receive(result)


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


class RequestQueue:
    """Requests to some processes in turn, for one reader; from `DecodingPool.open_queue`."""

    def __init__(
        self,
        pool: DecodingPool,
        reader: Reader,
        workers: list[_Worker],
        blocks: Blocks,
        *,
        held: int,
        receive: Callable[[Any], Any] | None,
    ) -> None:
        self.reader, self.blocks, self.held, self.receive = reader, blocks, held, receive
        self.is_closed = False
        self._pool = pool
        self._turn = itertools.cycle(workers)

    def put(self, request: Any) -> "Order | None":
        """Send a request; None where there is no room for its result, until results are taken and let go of."""
        offset = self.blocks.take()
        return None if offset is None else self._pool.order(self, next(self._turn), request, offset)

    def wait_for(self, order: "Order") -> None:
        """Wait for the answer to a request; see `Order.result`."""
        self._pool.wait_for(order)

    def results(self, requests: Iterator[Any], ahead: int) -> Iterator[Any]:
        """Returns the result of each request, `ahead` of which are on their way from now on, as far as there is room.

        Behind the last of them the queue is closed.
        """
        orders: deque[Order] = deque()

        def fill() -> None:
            while len(orders) < ahead and self.blocks.has_free:
                try:
                    request = next(requests)
                except StopIteration:
                    return
                orders.append(cast("Order", self.put(request)))

        fill()
        return self._in_turn(orders, fill)

    def _in_turn(self, orders: "deque[Order]", fill: Callable[[], None]) -> Iterator[Any]:
        try:
            while orders:
                order = orders.popleft()
                self._pool.wait_for(order)
                fill()
                yield order.result()
                fill()
        finally:
            self.close()

    def close(self) -> None:
        """Forget what is on its way: whoever waits for it gets a `StopRequestedError`."""
        self.is_closed = True
        self._pool.forget(self)


@dataclass(slots=True, eq=False)
class Order:
    """A request on its way; from `RequestQueue.put`."""

    ticket: int
    queue: RequestQueue
    worker: _Worker
    offset: int
    """Of the block for its result."""
    is_answered: bool = False
    _answer: Done | Failed | None = None
    _received: Any = None

    def take(self, answer: Done | Failed) -> None:
        """Note the answer; called by the process's thread."""
        blocks, receive = self.queue.blocks, self.queue.receive
        if isinstance(answer, Done) and receive is not None:
            self._received = receive(answer.result.unpack(blocks.view(self.offset)))
            blocks.give_back(self.offset)
        self._answer, self.is_answered = answer, True

    def result(self) -> Any:
        """Wait for what comes of it, and return that, or raise it.

        Raises:
            LostProcessError: a process died or does not answer.
            StopRequestedError: nobody wants it any more.
        """
        self.queue.wait_for(self)
        blocks, answer = self.queue.blocks, self._answer
        if isinstance(answer, Failed):
            blocks.give_back(self.offset)
            answer.error.add_note(answer.trace)
            raise answer.error
        assert answer is not None
        if self.queue.receive is not None:
            return self._received
        if blocks.lent < self.queue.held:
            return answer.result.unpack(blocks.lend(self.offset))
        copied = bytearray(blocks.view(self.offset))
        blocks.give_back(self.offset)
        return answer.result.unpack(copied)
