"""Where actors fetch orders and say how they get on: an actor beside the driver, which may be lost without a loss.

What is to be done is the driver's to know. The board holds the next few orders and what nobody has read yet; a new one
is filled again within a second, and what went with the old one is found missing and done again.
"""

import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.labelling.work_plan import Order, StepOutcome
from pipeline.runtime.ray_pulse import PulseBoard

_ANSWER_SECONDS = 10.0
_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Event:
    """What somebody says on the board."""

    what: str
    """`step`: one of an order's ended; `ended`: nobody works at the order any more; `lost`: whoever did has died;
    `unfit`: whoever had it can't load the teachers; `told`: something for people."""
    order: int
    about: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardState:
    """What the driver reads."""

    generation: str
    """Another one where the board began anew."""
    waiting: set[int]
    """Orders that nobody has fetched."""
    events: list[Event]
    """What has happened since the driver read last."""
    last_event: int
    """Number of the last of them."""
    clips: dict[int, int]
    """How many clips of an order's steps are done that have not ended."""
    signs: dict[str, object]
    """Signs of life of the work at a step."""


class WorkBoard(PulseBoard):
    """Made an actor by `BoardHandle.open`."""

    def __init__(self) -> None:
        super().__init__()
        self._generation = secrets.token_hex(4)
        self._known: set[int] = set()
        self._waiting: deque[Order] = deque()
        self._in_hand: defaultdict[int, set[int]] = defaultdict(set)
        """Orders of each worker: one that it computes, and perhaps the one before, whose end is being published."""
        self._events: list[Event] = []
        self._read = 0
        self._clips: dict[tuple[int, str, int], int] = {}
        self._stopped = False

    def hello(self, worker: int) -> None:
        """Note that a worker begins; what it had in hand before was lost with its process."""
        self._events.extend(Event("lost", number) for number in sorted(self._in_hand.pop(worker, ())))

    def fetch(self, worker: int, ahead: bool = False) -> tuple[bool, Order | None]:
        """Returns whether the work goes on, and an order for a worker, if there is one.

        Args:
            worker: who asks.
            ahead: he is still at another one, so that he gets one only if there is one for each who is at work.
        """
        wanted = sum(map(bool, self._in_hand.values())) if ahead else 1
        if self._stopped or len(self._waiting) < wanted or not self._waiting:
            return not self._stopped, None
        order = self._waiting.popleft()
        self._in_hand[worker].add(order.number)
        return True, order

    def step(self, worker: int, number: int, outcome: StepOutcome) -> None:
        """Note how a step ended."""
        self._in_hand[worker].add(number)  # this board may have begun meanwhile
        self._clips.pop((number, outcome.shard, outcome.start), None)
        self._events.append(Event("step", number, outcome))

    def ended(self, worker: int, number: int) -> None:
        """Note that a worker has done with an order."""
        self._in_hand[worker].discard(number)
        self._events.append(Event("ended", number))

    def unfit(self, worker: int, number: int, machine: str, why: str) -> None:
        """Note that a worker can't load the teachers, and gives its order back."""
        self._in_hand[worker].discard(number)
        self._events.append(Event("unfit", number, (worker, machine, why)))

    def tell(self, text: str) -> None:
        """Note what is to be told to people."""
        self._events.append(Event("told", 0, text))

    def set_done(self, number: int, shard: str, start: int, clips: int) -> None:
        """Note how many clips of an order's step are done; the one before may still be on its way to the store."""
        self._clips[number, shard, start] = clips

    def goes_on(self) -> bool:
        """Returns whether there may be something left to do."""
        return not self._stopped

    def stop(self) -> None:
        """Let nobody begin anything more."""
        self._stopped = True

    def exchange(self, orders: Sequence[Order], generation: str, read: int) -> BoardState:
        """Take orders, and return what is new.

        Args:
            orders: all that nobody has fetched, as far as the driver knows.
            generation: which board the driver has read.
            read: number of the last event that it has read.
        """
        clips: Counter[int] = Counter()
        for (number, _, _), count in self._clips.items():
            clips[number] += count
        for order in orders:
            if order.number not in self._known:
                self._known.add(order.number)
                self._waiting.append(order)
        if generation == self._generation:
            del self._events[: read - self._read]
            self._read = read
        return BoardState(
            generation=self._generation,
            waiting={order.number for order in self._waiting},
            events=list(self._events),
            last_event=self._read + len(self._events),
            clips=dict(clips),
            signs=dict(self._signs),
        )


class BoardHandle:
    """The way to a board, for the driver and, pickled, for the actors; it finds a board again that began anew.

    Args:
        name: of the board.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    @classmethod
    def open(cls) -> "BoardHandle":
        """Make a board on this machine."""
        board = cls(f"work-{secrets.token_hex(8)}")
        board.make()
        return board

    def make(self) -> None:
        """Make the board, where it is gone for good."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "scheduling_strategy": here}
        self._actor = ray.remote(WorkBoard).options(name=self._name, get_if_exists=True, **options).remote()

    def tell(self, method: str, *given: object) -> None:
        """Tell the board something that nobody needs to know for certain."""
        with suppress(RayError, ValueError):
            getattr(self._found(), method).remote(*given)

    def ask(self, method: str, *given: object, patience: float = 0.0) -> Any:
        """Returns the board's answer; again for so many seconds, while there is none.

        Raises:
            RayError: there is none.
        """
        end = time.monotonic() + patience
        while True:
            try:
                return ray.get(getattr(self._found(), method).remote(*given), timeout=_ANSWER_SECONDS)
            except (RayError, ValueError) as error:  # the latter: no board of this name, at the moment
                if isinstance(error, RayActorError | ValueError):
                    self._actor = None
                if time.monotonic() > end:
                    raise error if isinstance(error, RayError) else RayActorError() from error
            time.sleep(_AGAIN_SECONDS)

    def __getattr__(self, method: str) -> Any:
        """Returns an actor's method, as of its handle: for `beating` and `PulseWatch`."""
        if method.startswith("_"):
            raise AttributeError(method)
        try:
            return getattr(self._found(), method)
        except ValueError as error:
            raise RayActorError from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_actor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _found(self) -> Any:
        if self._actor is None:
            self._actor = ray.get_actor(self._name)
        return self._actor


def exchange(board: BoardHandle, orders: Sequence[Order], generation: str, read: int) -> BoardState | None:
    """Returns what is new on the board, and leaves orders there; None where it does not answer, and is made anew."""
    try:
        return cast("BoardState", board.ask("exchange", orders, generation, read))
    except RayError as error:
        if isinstance(error, RayActorError):
            with suppress(RayError, ValueError):
                board.make()
        return None
