"""Where a command that trains on Ray says that it is to stop, and its ranks say what they do and how they ended.

It imports no torch: its process would have half a gigabyte more, on a head that may have little memory.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import LostProcessError, PipelineError, StorageUnavailableError
from pipeline.runtime.ray_pulse import PulseBoard

ANSWER_SECONDS = 60.0
"""How long the board may take to answer; it only notes what it is told."""
_STOP_SECONDS = 5.0
"""How long it waits to be told to stop before it says that it was not."""
_MAX_LINES = 1000
_LATE_SECONDS = 1.0
"""How long a rank that found another one gone waits for what that one has to say of itself."""

Board = Any
"""A handle of the board's actor."""


@dataclass(frozen=True, slots=True)
class News:
    """What happened since somebody last asked."""

    starts: int
    """How often the ranks were started."""
    waiting: bool
    """Whether they are to be started, or started again."""
    loss: str
    """Why they were the last time but one, as far as one of them could tell."""
    lines: list[tuple[int, str]]
    """What they logged: level and line."""


def may_be_mended(error: PipelineError) -> bool:
    """Whether ranks that are started again may get further."""
    return isinstance(error, LostProcessError | StorageUnavailableError)


def start_board() -> Board:
    """Start the board beside this process, so that no other machine's end is its end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return _Board.options(**options).remote()  # pyright: ignore[reportAttributeAccessIssue]


@ray.remote(num_cpus=0)
class _Board(PulseBoard):
    def __init__(self) -> None:
        super().__init__()
        self._stop = asyncio.Event()
        self._result: dict[str, Any] | None = None
        self._error: PipelineError | None = None
        self._starts, self._loss = 0, ""
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MAX_LINES)

    async def stop(self) -> None:
        self._stop.set()

    async def stopping(self) -> bool:
        """Returns at once when it is so, or else after some seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), _STOP_SECONDS)
        return self._stop.is_set()

    async def begin(self, rank: int) -> bool:
        """Returns whether it is of any use that a rank begins."""
        if not self._mendable():
            return False
        if rank == 0:
            self._starts += 1
            self._loss, self._error = str(self._error or ""), None
        return True

    async def fail(self, error: PipelineError, rank: int) -> bool:
        """Note why a rank ended; returns whether it may be mended by starting all again, by what all of them say."""
        of_this_alone = not may_be_mended(error)
        if self._error is None or (self._mendable() and (rank == 0 or of_this_alone)):
            self._error = error  # the first rank also says what is saved
        if not of_this_alone:
            await asyncio.sleep(_LATE_SECONDS)
        return self._mendable()

    def _mendable(self) -> bool:
        return self._error is None or may_be_mended(self._error)

    async def finish(self, result: dict[str, Any]) -> None:
        self._result = result

    async def result(self) -> dict[str, Any] | None:
        """Returns the fields of what the first rank's command returned; None where it has not ended well."""
        return self._result

    async def error(self) -> PipelineError | None:
        return self._error

    async def tell(self, level: int, line: str) -> None:
        self._lines.append((level, line))

    async def news(self) -> News:
        lines = list(self._lines)
        self._lines.clear()
        return News(self._starts, self._starts == 0 or self._error is not None, self._loss, lines)


@contextmanager
def told_to(board: Board, rank: int) -> Iterator[None]:
    """Let the board pass on what this rank logs in the block; of others than the first one, warnings."""
    handler, logger = _ToBoard(board, rank), logging.getLogger("pipeline")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _ToBoard(logging.Handler):
    def __init__(self, board: Board, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._board, self._prefix = board, f"rank {rank}: " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        self._board.tell.remote(record.levelno, self._prefix + self.format(record))
