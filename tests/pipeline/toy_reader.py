"""Work for decoding processes that needs no sounds: a request is a list of numbers, and some numbers are trouble."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.decoding.shared_memory import Arena
from pipeline.decoding.worker import Reader

KILLED, STOPPED, LOST_IN_A_CALL, REFUSED, UNSPEAKABLE, SLOW = -1, -2, -3, -4, -5, -6


@dataclass
class Answer:
    squares: np.ndarray
    process: int
    modules: frozenset[str]


class UnspeakableError(Exception):
    """Can't be pickled."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")
        self.socket = sys.stdout


class ToyReader:
    def __init__(self, size: int = 1000) -> None:
        self.table = np.arange(size) ** 2

    def load(self, request: Sequence[int], arena: Arena, at: Callable[[int], None]) -> Answer:
        squares = arena.empty((len(request), 100), np.int64)
        for place, number in enumerate(request):
            at(number)
            if number < 0:
                trouble(number)
            squares[place] = self.table[number]
        print("a library prints what it likes", flush=True)
        return Answer(squares, os.getpid(), frozenset(sys.modules))

    def result_bytes(self, request: Sequence[int]) -> int:
        return 800 * len(request)

    def name_of(self, row: int) -> str:
        return f"number {row}"


class TellingReader:
    """Does another one's work, and tells which modules its process has then."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def load(self, request: object, arena: Arena, at: Callable[[int], None]) -> set[str]:
        self.reader.load(request, arena, at)
        return set(sys.modules)

    def result_bytes(self, request: object) -> int:
        return self.reader.result_bytes(request)

    def name_of(self, row: int) -> str:
        return self.reader.name_of(row)


def trouble(number: int) -> None:
    if number == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == STOPPED:
        os.kill(os.getpid(), signal.SIGSTOP)
    if number == LOST_IN_A_CALL:
        wait_for_ever()
    if number == REFUSED:
        raise ValueError("not this one")
    if number == UNSPEAKABLE:
        raise UnspeakableError(1, 2)
    if number == SLOW:
        time.sleep(0.4)


def wait_for_ever() -> None:
    while True:
        time.sleep(60)
