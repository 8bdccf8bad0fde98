"""A process that reads and decodes for another one: takes requests from its input, gives results to its output.

It is a Python of its own, not a copy of the process that wants the work: that one has threads by the time it needs it,
and a copy of a process with threads can lock for ever (CPython 112275, PyTorch 130610). It imports what the work needs,
which is neither torch nor Arrow, and ends with the process that it works for.
"""

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from pipeline.decoding.messages import Begin, Channel, Do, Done, Failed, Forget, Learn
from pipeline.decoding.shared_memory import Arena, Packed, append_to_shared, map_shared
from pipeline.runtime.watching import tell_where_on_request

_KILLED_FIRST = 500
"""Of 1000: the kernel, out of memory, takes a worker before the process that can tell what happened and save."""
_UNTIL_THE_END_IS_SEEN = 2.0
"""Seconds: the kernel closes a killed process's files within milliseconds, on a busy machine too."""


class Reader(Protocol):
    """The work: requests in, results out. It is pickled once, and imports neither torch nor Arrow."""

    def load(self, request: Any, arena: Arena, at: Callable[[int], None]) -> Any:
        """Do what is asked for.

        Args:
            request: what.
            arena: where the result's arrays are best made, for then nobody has to copy them.
            at: to be told the row of each clip before it is begun, as a sign of life.
        """
        ...

    def result_bytes(self, request: Any) -> int:
        """Returns how much memory the arrays of a result take, at most."""
        ...

    def name_of(self, row: int) -> str:
        """Name a clip, for messages."""
        ...


def main() -> None:
    """Work until the process that wants it closes its end, or ends itself."""
    channel = _take_standard_streams()
    messages: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, messages), daemon=True).start()
    try:
        _work(channel, messages)
    except OSError:
        # Where the process that wants the work was killed, its pipes and shared files go before anybody is told:
        # `_listen` ends this one without a word. Otherwise it is a fault of its own.
        time.sleep(_UNTIL_THE_END_IS_SEEN)
        raise


def _work(channel: Channel, messages: "SimpleQueue[Any]") -> None:
    begin: Begin = messages.get()
    _prepare(begin)
    signs = np.frombuffer(map_shared(begin.signs, writable=True), np.int64)[2 * begin.number :][:2]
    desk = _Desk(signs)
    while True:
        answer = desk.handle(messages.get())
        if answer is not None:
            channel.send(answer)


def _take_standard_streams() -> Channel:
    # Whatever a library prints must not get between the answers.
    reading, writing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return Channel(reading, writing)


def _prepare(begin: Begin) -> None:
    tell_where_on_request(append_to_shared(begin.dumps))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as score:
        score.write(str(_KILLED_FIRST))


def _listen(channel: Channel, messages: "SimpleQueue[Any]") -> None:
    """Take messages in, so that nobody waits to send one, and end the process at the end of its input."""
    try:
        while True:
            messages.put(channel.receive())
    except (EOFError, OSError):
        os._exit(0)


class _Desk:
    """Answers one message after the other."""

    def __init__(self, signs: np.ndarray) -> None:
        self._signs = signs
        self._readers: dict[int, Reader | Learn] = {}
        self._memories: dict[str, mmap] = {}

    def handle(self, message: object) -> Done | Failed | None:
        match message:
            case Learn():
                self._readers[message.reader] = message
            case Forget():
                self._memories.pop(message.memory, None)
            case Do():
                try:
                    return Done(message.ticket, self._do(message))
                except Exception as error:
                    return _failed(message.ticket, error)
        return None

    def _do(self, message: Do) -> Packed:
        if message.memory not in self._memories:
            self._memories[message.memory] = map_shared(message.memory, writable=True)
        memory = memoryview(self._memories[message.memory])[message.offset : message.offset + message.size]
        arena = Arena(memory)
        return arena.pack(self._reader(message.reader).load(message.request, arena, self._note))

    def _reader(self, number: int) -> Reader:
        reader = self._readers[number]
        if isinstance(reader, Learn):  # made only now, so that what goes wrong is an answer
            reader = self._readers[number] = reader.packed.unpack(map_shared(reader.memory))
        return reader

    def _note(self, row: int) -> None:
        self._signs[1] = row
        self._signs[0] += 1


def _failed(ticket: int, error: Exception) -> Failed:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failed(ticket, error, traceback.format_exc())
