"""Who labels what next: orders of about a minute, cut where they take longer, given again where they are lost.

It is told what happened and knows neither Ray nor files nor clocks.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.labelling.clip_range import ClipRange, ShardJoin

ORDER_SECONDS = 60.0
"""How much work an order holds, as far as the speed is known."""
_FIRST_SECONDS = 10.0
"""After so long the first orders are cut, so that the speed is known soon."""
_MOST_SECONDS = 1.5 * ORDER_SECONDS
"""After so long an order is cut that was thought to take a minute."""
_MAX_BATCHES = 100
"""The first batch of an order has nobody to decode it ahead: among this many it no longer matters."""
_TRIES = 2
"""How often a shard is begun whose actor or decoding processes are lost: killed by the kernel for their memory, or with
their machine. The last chance at the end is one more."""


Step = ClipRange | ShardJoin


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """How a step ended: what was done of it, or what stopped it."""

    shard: str
    start: int = 0
    stop: int = 0
    """Behind the last clip that was done."""
    failed: int = 0
    """Of these, clips without logits."""
    published: bool = False
    """Whether the shard's part is there now."""
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    copying_seconds: float = 0.0
    publishing_seconds: float = 0.0
    """Time in which the next step waited for its publication."""
    idle_seconds: float = 0.0
    """Before it, in which the actor had nothing to do, or waited for Ray."""
    error: str = ""
    warning: str = ""
    """What else there is to say of it, though it may have been done in the end."""
    ends_run: bool = False
    """No shard will do better: the teachers could not be loaded, or the store is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What one actor does next."""

    number: int
    steps: tuple[Step, ...]
    seconds: float
    """After so long the rest is given back."""
    tries: int
    """How often a step is begun whose decoding processes are lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOutcome:
    """How one shard ended: with the figures of its stretches, or with what stopped it."""

    shard: str
    clips: int = 0
    failed: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    copying_seconds: float = 0.0
    publishing_seconds: float = 0.0
    idle_seconds: float = 0.0
    error: str = ""
    warning: str = ""
    ends_run: bool = False


class _Steps:
    """Steps in a row, and how many clips they are together; nothing takes longer where there are more of them.

    Args:
        size: how many clips a step has.
        untouched: behind them, the steps of each shard that nobody has begun; they are made when their turn comes, so
            that there are few objects at any time: Python looks through all that there are, again and again.
        clips: of the untouched.
    """

    def __init__(self, size: Callable[[Step], int], untouched: Iterable[Iterable[Step]] = (), clips: int = 0) -> None:
        self._size = size
        self._steps: deque[Step] = deque()
        self._untouched = iter(untouched)
        self._of_shard: Counter[str] = Counter()
        self.clips = clips

    def __bool__(self) -> bool:
        return self.first is not None

    @property
    def first(self) -> Step | None:
        while not self._steps:
            steps = next(self._untouched, None)
            if steps is None:
                return None
            for step in steps:
                self.append(step)
                self.clips -= self._size(step)  # it was counted among the untouched
        return self._steps[0]

    def append(self, step: Step) -> None:
        self._count(step, 1)
        self._steps.append(step)

    def appendleft(self, step: Step) -> None:
        self._count(step, 1)
        self._steps.appendleft(step)

    def popleft(self) -> Step:
        """Take out the `first`, which there has to be."""
        step = self._steps.popleft()
        self._count(step, -1)
        return step

    def remove(self, shard: str) -> list[Step]:
        """Take out a shard's steps, which hardly any shard has when it ends."""
        if not self._of_shard[shard]:
            return []
        mine = [step for step in self._steps if step.shard == shard]
        self._steps = deque(step for step in self._steps if step.shard != shard)
        for step in mine:
            self._count(step, -1)
        return mine

    def _count(self, step: Step, change: int) -> None:
        self._of_shard[step.shard] += change
        if not self._of_shard[step.shard]:
            del self._of_shard[step.shard]
        self.clips += change * self._size(step)


class WorkPlan:
    """What is left to do, what is under way and what has ended.

    Small shards are several in an order at first, and one by one towards the end: each order takes half of an even
    share of what is left (guided self-scheduling: Polychronopoulos and Kuck 1987, doi:10.1109/TC.1987.5009495), so that
    no actor has a long last one. A shard that takes longer than a minute is divided, at the bounds of its batches:
    every batch is that of the undivided shard. What fails is tried again when nothing else is left, once.

    Args:
        shards: their names, and how many clips each has.
        actors: how many share the work.
        batch_size: clips a batch.
        done: stretches of shards, (start, stop), that were labelled before.
    """

    def __init__(
        self,
        shards: Mapping[str, int],
        *,
        actors: int,
        batch_size: int,
        done: Mapping[str, Iterable[tuple[int, int]]] | None = None,
    ) -> None:
        self._clips, self._actors, self._batch_size = dict(shards), actors, batch_size
        self._done = {
            shard: _without_overlaps(pieces, shards[shard]) for shard, pieces in (done or {}).items() if shard in shards
        }
        """Stretches of the shards that were begun and have not ended."""
        self._figures: dict[str, ShardOutcome] = {}
        """Of the same."""
        self._clips_done = sum(stop - start for pieces in self._done.values() for start, stop in pieces)
        left = sum(shards.values()) - self._clips_done
        self._pending = _Steps(self._size, map(self._steps_left, self._clips), left)
        self._again = _Steps(self._size)
        self._orders: dict[int, tuple[Order, int]] = {}
        self._ended: deque[ShardOutcome] = deque()
        self._open = set(shards)
        self._given = 0
        self._losses: Counter[str] = Counter()
        self._tried_again: set[str] = set()
        self._recent: deque[tuple[int, float]] = deque(maxlen=4 * actors)

    @property
    def finished(self) -> bool:
        """Whether every shard has ended."""
        return not self._open

    @property
    def clips_done(self) -> int:
        """How many clips were done, those that were done before included."""
        return self._clips_done

    def take_ended(self) -> list[ShardOutcome]:
        """Returns the shards that have ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def step_of(self, number: int) -> Step | None:
        """Returns the step that an order is at; None behind its last, or where nobody works at it any more."""
        order, ended = self._orders.get(number, (None, 0))
        return None if order is None or ended == len(order.steps) else order.steps[ended]

    def take(self) -> Order | None:
        """Returns the next order; None where there is none at the moment."""
        last_chance = not self._pending and bool(self._again)
        if last_chance:
            self._pending.append(self._again.popleft())
        if not self._pending:
            return None
        steps, taken, speed = [], 0, self._speed()
        minute = ORDER_SECONDS * speed if speed else float("inf")
        limit = min(self._pending.clips / (2 * self._actors), _MAX_BATCHES * self._batch_size, minute)
        while (first := self._pending.first) is not None and (
            not steps or (taken + self._size(first) <= limit and not last_chance)
        ):
            step = self._pending.popleft()
            if isinstance(step, ClipRange) and self._size(step) > minute:
                step = self._cut(step, minute)
            steps.append(step)
            taken += self._size(step)
        self._given += 1
        order = Order(
            number=self._given,
            steps=tuple(steps),
            seconds=_MOST_SECONDS if speed else _FIRST_SECONDS,
            tries=1 if last_chance else _TRIES,
        )
        self._orders[order.number] = order, 0
        return order

    def step_ended(self, number: int, outcome: StepOutcome) -> None:
        """Note how the next step of an order ended; what comes of an order that was given to others is passed over."""
        if number not in self._orders:
            return
        order, ended = self._orders[number]
        step = self.step_of(number)
        if step is None or (outcome.shard, outcome.start) != (step.shard, _start_of(step)):
            return
        self._orders[number] = order, ended + 1
        if outcome.error:
            self._fail(step, outcome)
        else:
            self._count(step, outcome)

    def order_ended(self, number: int) -> None:
        """Note that nobody works at an order any more; what is left of it is given to others."""
        order, ended = self._orders.pop(number, (None, 0))
        if order is not None:
            for step in reversed(order.steps[ended:]):
                self._put_back(step)

    def order_lost(self, number: int) -> None:
        """Note that the actor which had an order died over it."""
        order, ended = self._orders.get(number, (None, 0))
        if order is not None and ended < len(order.steps):
            shard = order.steps[ended].shard
            self._losses[shard] += 1
            if self._losses[shard] >= _TRIES:
                error = f"killed its worker {self._losses[shard]} times; is there too little memory?"
                start = _start_of(order.steps[ended])
                self.step_ended(number, StepOutcome(shard=shard, start=start, error=error))
        self.order_ended(number)

    def _speed(self) -> float:
        """Returns how many clips an actor does in a second; 0 where nobody knows yet."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(clips for clips, _ in self._recent) / seconds if seconds else 0.0

    def _size(self, step: Step) -> int:
        if isinstance(step, ShardJoin):
            return 0
        bounds = step.within(self._clips[step.shard])
        return bounds.stop - bounds.start

    def _cut(self, step: ClipRange, clips: float) -> ClipRange:
        """Give back what is more than so many clips, at least a batch."""
        bounds = step.within(self._clips[step.shard])
        cut = bounds.start + max(1, int(clips / self._batch_size)) * self._batch_size
        if cut >= bounds.stop:
            return step
        self._pending.appendleft(ClipRange(step.shard, cut, bounds.stop))
        return ClipRange(step.shard, bounds.start, cut)

    def _put_back(self, step: Step) -> None:
        if step.shard not in self._open:
            return
        following = self._pending.first
        if (
            isinstance(step, ClipRange)
            and isinstance(following, ClipRange)
            and (step.shard, step.stop) == (following.shard, following.start)
        ):
            step = replace(self._pending.popleft(), start=step.start)  # pyright: ignore[reportArgumentType]
        self._pending.appendleft(step)

    def _count(self, step: Step, outcome: StepOutcome) -> None:
        shard = step.shard
        if shard not in self._open:
            return
        figures = self._figures_of(shard)
        if isinstance(step, ClipRange):
            self._figures[shard] = replace(
                figures,
                clips=figures.clips + outcome.stop - outcome.start,
                failed=figures.failed + outcome.failed,
                seconds=figures.seconds + outcome.seconds,
                waiting_seconds=figures.waiting_seconds + outcome.waiting_seconds,
                copying_seconds=figures.copying_seconds + outcome.copying_seconds,
                publishing_seconds=figures.publishing_seconds + outcome.publishing_seconds,
                idle_seconds=figures.idle_seconds + outcome.idle_seconds,
                warning=outcome.warning or figures.warning,
            )
            self._recent.append((outcome.stop - outcome.start, outcome.seconds))
            self._done[shard] = sorted([*self._done.get(shard, ()), (outcome.start, outcome.stop)])
            self._clips_done += outcome.stop - outcome.start
            if outcome.stop < step.within(self._clips[shard]).stop:
                self._put_back(ClipRange(shard, outcome.stop, step.within(self._clips[shard]).stop))
        if outcome.published:
            self._end(self._figures_of(shard))
        elif isinstance(step, ClipRange):
            left = self._steps_left(shard)
            if len(left) == 1 and isinstance(left[0], ShardJoin):
                self._pending.appendleft(left[0])

    def _fail(self, step: Step, outcome: StepOutcome) -> None:
        if outcome.ends_run or step.shard in self._tried_again:
            figures = self._figures_of(step.shard)
            warning = outcome.warning or figures.warning
            self._end(replace(figures, error=outcome.error, warning=warning, ends_run=outcome.ends_run))
            return
        self._tried_again.add(step.shard)
        # All that is left of the shard waits with it, and nothing that was not done is lost.
        for other in [step, *self._pending.remove(step.shard)]:
            self._again.append(other)

    def _end(self, outcome: ShardOutcome) -> None:
        if outcome.shard in self._open:
            self._open.remove(outcome.shard)
            self._ended.append(outcome)
            self._figures.pop(outcome.shard, None)
            self._done.pop(outcome.shard, None)
            self._pending.remove(outcome.shard)
            self._again.remove(outcome.shard)

    def _figures_of(self, shard: str) -> ShardOutcome:
        return self._figures.get(shard) or ShardOutcome(shard=shard)

    def _steps_left(self, shard: str) -> list[Step]:
        """Returns the gaps between what was done of a shard, or the join where there is none."""
        clips, place, gaps = self._clips[shard], 0, []
        done = self._done.get(shard, ())
        for start, stop in done:
            if start > place:
                gaps.append(ClipRange(shard, place, start))
            place = stop
        if place < clips or not done:
            gaps.append(ClipRange(shard, place, clips))
        return gaps or [ShardJoin(shard, tuple(done))]


def _start_of(step: Step) -> int:
    return step.start if isinstance(step, ClipRange) else 0


def _without_overlaps(pieces: Iterable[tuple[int, int]], clips: int) -> list[tuple[int, int]]:
    """Choose pieces that don't overlap; of those that begin at the same clip the longest."""
    chosen: list[tuple[int, int]] = []
    for start, stop in sorted(pieces, key=lambda piece: (piece[0], -piece[1])):
        if start < stop <= clips and (not chosen or start >= chosen[-1][1]):
            chosen.append((start, stop))
    return chosen


def steps_and_followers(steps: Sequence[Step]) -> list[tuple[Step, ClipRange | None]]:
    """Returns each step with the stretch that is labelled after it, whose clips may be decoded meanwhile."""
    followers = [*steps[1:], None]
    return [
        (step, following if isinstance(following, ClipRange) else None)
        for step, following in zip(steps, followers, strict=True)
    ]
