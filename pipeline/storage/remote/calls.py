"""Requests: so many at a time, each in a thread that nobody has to wait for, with their failures put into words."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import PipelineError, StorageError
from pipeline.storage.remote.failures import explain
from pipeline.storage.remote.stores import open_store

CONCURRENCY = 16
"""Requests under way at the same time, in each process."""

_LOOK_UP_SECONDS = 1.0
"""A signal that comes just before a thread falls asleep waits for it to wake: nobody sleeps longer than this."""

Result = TypeVar("Result")
Action = Callable[[Any, str], Result]
"""Given the store behind a URL and the file's path in it."""
_Queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]]]

_queues: dict[int, _Queue] = {}
_starting = threading.Lock()


def call(location: str, action: Action[Result]) -> Result:
    """Do something with a file.

    Raises:
        FileNotFoundError: nothing is there.
        StorageUnavailableError: the server can't be reached, or keeps failing.
        StorageError: it refuses, for instance for want of credentials.
    """
    [found] = _do([partial(_attempt, location, action)])
    if isinstance(found, Exception):
        raise found
    return found


def call_each(locations: Sequence[str], actions: Sequence[Action[Result]]) -> list[Result | Exception]:
    """Do something with each of many files, side by side.

    Returns:
        For each the result, or what `call` would raise.
    """
    return _do([partial(_attempt, location, action) for location, action in zip(locations, actions, strict=True)])


def _attempt(location: str, action: Action[Result]) -> Result | Exception:
    try:
        return action(*open_store(location))
    except PipelineError as error:
        return error
    except BaseException as error:  # a panic of Rust's is no Exception, and somebody waits for an answer
        explained = explain(error, location)
        explained.__cause__ = error
        return explained


def _do(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    answers: list[Future[Result]] = [Future() for _ in tasks]
    queue = _queue()
    for request in zip(answers, tasks, strict=True):
        queue.put(request)
    try:
        while wait(answers, _LOOK_UP_SECONDS).not_done:
            pass  # `stores` limits how long a silent server is waited for
        return [answer.result() for answer in answers]
    except BaseException:  # somebody wants this process to stop
        for answer in answers:
            answer.cancel()
        raise


def _queue() -> _Queue:
    """Return what this process's threads take their work from; they end with the process."""
    if os.getpid() not in _queues:
        if _queues:
            # Threads, ours and obstore's, stay behind when a process forks: the new one would wait for them for ever.
            raise StorageError(
                "a process that had read from a server was forked, and the new one can't read from servers. Let "
                "processes be started by multiprocessing's 'forkserver' or 'spawn'"
            )
        with _starting:
            if not _queues:
                queue = _Queue()
                for _ in range(CONCURRENCY):
                    threading.Thread(target=_work, args=(queue,), name="requests", daemon=True).start()
                _queues[os.getpid()] = queue
    return _queues[os.getpid()]


def _work(queue: _Queue) -> None:
    while True:
        answer, task = queue.get()
        if answer.set_running_or_notify_cancel():
            answer.set_result(task())
