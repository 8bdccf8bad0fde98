"""Signs of life of what runs on Ray: whoever waits for it learns within a stated time that it does nothing any more.

Work on other machines can't be looked at from here. So it tells a board, an actor that outlives it, from time to time
whether its thread has done anything, and whoever waits asks the board.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.exceptions import RayError

from pipeline.errors import LostProcessError
from pipeline.runtime.threads import sign_of_life
from pipeline.runtime.watching import Watch

_BEAT_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_START_SECONDS = 60.0
"""How long the board may at least take until its first answer, for a busy machine starts its process slowly."""


class PulseBoard:
    """What the work tells; made an actor by whoever waits for the work."""

    def __init__(self) -> None:
        self._signs: dict[str, object] = {}
        self._beats = 0

    def beat(self, who: str, sign: object) -> None:
        """Note that some work is under way."""
        if self._signs.get(who) != sign:
            self._signs[who] = sign
            self._beats += 1

    def rest(self, who: str) -> None:
        """Note that it has ended."""
        self._signs.pop(who, None)
        self._beats += 1

    def pulse(self) -> tuple[int, list[str]]:
        """Returns a number that grows as long as somebody does something, and whose work is under way."""
        return self._beats, list(self._signs)


@contextmanager
def beating(board: Any, who: str, sign: Callable[[], object] | None = None) -> Iterator[None]:
    """Give signs of life of this thread to a board of another process while the block runs.

    Args:
        board: a handle of the actor.
        who: names the work.
        sign: gives what changes while there is progress, where others than this thread make it.
    """
    thread, ended = threading.current_thread(), threading.Event()

    def beat() -> None:
        while True:
            board.beat.remote(who, sign_of_life(thread) if sign is None else sign())
            if ended.wait(_BEAT_SECONDS):
                board.rest.remote(who)
                return

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class PulseWatch:
    """Looks at a board, in a thread, while the `with` block runs.

    Args:
        board: a handle of the actor.
        patience: how long there may be no sign of life of any work, in seconds.
        on_look: also done from time to time; what it asks of Ray has a limit.
        remedy: how to go on, for the message.
    """

    def __init__(
        self,
        board: Any,
        patience: float,
        *,
        on_look: Callable[[], None] = lambda: None,
        remedy: str = "the same command goes on with the rest",
    ) -> None:
        self._board, self._patience, self._on_look, self._remedy = board, patience, on_look, remedy
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="pulse", daemon=True)
        self._silence = ""

    def check(self) -> None:
        """Raise LostProcessError where there has been no sign of life for too long."""
        if self._silence:
            raise LostProcessError(self._silence)

    def __enter__(self) -> "PulseWatch":
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._ended.set()
        self._thread.join(_ANSWER_SECONDS + 5)

    def _look(self) -> None:
        watch = Watch(self._patience)
        busy: list[str] = []
        answers, limit = True, max(self._patience, _START_SECONDS)
        while not self._ended.wait(_LOOK_SECONDS):
            try:
                beats, busy = cast(
                    "tuple[int, list[str]]", ray.get(self._board.pulse.remote(), timeout=_ANSWER_SECONDS)
                )
                answers, limit = True, self._patience
            except RayError:
                beats, answers = None, False
            watch.see(beats)
            self._on_look()
            if not watch.longer_than(limit):
                continue
            if answers and not busy:  # nothing has begun: whoever gave the work tells what it waits for
                watch = Watch(self._patience)
                continue
            self._silence = self._put_into_words(busy, answers, limit)
        self._on_look()

    def _put_into_words(self, busy: list[str], answers: bool, seconds: float) -> str:
        if not answers:
            return f"the Ray cluster has not answered for {seconds:g} s; {self._remedy}"
        work = ", ".join(sorted(busy)[:3]) + (f" and {len(busy) - 3} more" if len(busy) > 3 else "")
        return (
            f"there has been no sign of life of the work on Ray for {seconds:g} s; under way: {work}. End what "
            f"is stopped there; {self._remedy}. --patience allows more"
        )
