"""Signs of life that ranks give each other beside their collectives, through the store at which they met.

A collective does not tell who keeps it waiting. So each rank writes down, twice a second, how far it has come and where
it stands, and whoever waits in vain finds there which rank it waits for. One that works takes as long as it takes.
"""

import faulthandler
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.decoding.shared_memory import SharedFile, append_to_shared
from pipeline.errors import LostProcessError
from pipeline.runtime.last_resort import explain
from pipeline.runtime.stopping import asked_to_stop
from pipeline.runtime.threads import sign_of_life
from pipeline.runtime.watching import (
    LOOK_SECONDS,
    Watch,
    call_of_thread,
    has_ended,
    tell_where_on_request,
    where_it_stands,
)

_STORE_SECONDS = 2.0
"""How long an answer of the store may take; it is asked again and again."""
_NEWS_SECONDS = 2.0
"""How long to look for the rank that made a collective fail."""
_STOP_SECONDS = 10.0
"""How long a rank may be without a sign of life once this process was asked to end: a scheduler soon kills it."""
_END_SECONDS = 5.0
"""How long a process may take to end that left a collective in the middle, whose threads still wait."""
_FOR_EVER = timedelta(days=1000)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """How many it has given."""
    collectives: int
    """How many it has begun."""
    life: object
    """Changes whenever its training thread has done anything."""
    where: str
    """Where that thread stands, in words."""
    ended: str
    """Why it leaves the others, as a message; empty while it does not."""
    process: int
    machine: str
    dumps: str
    """Path of the file that takes its stack, on its machine, should somebody ask for that."""


class Heartbeats:
    """Tells the other ranks how this one is, and finds out which of them does not answer.

    All ranks make one at the same time, in the thread that trains.

    Args:
        rank: this one's number.
        world_size: how many there are.
        patience: how long one of them may be waited for without a sign of life, in seconds.
        on_gpus: whether a step's collectives are NCCL's. They have to be aborted where a rank is lost: a thread looks.
    """

    def __init__(self, rank: int, world_size: int, patience: float, *, on_gpus: bool = False) -> None:
        self.rank, self.world_size, self.patience = rank, world_size, patience
        self.others = [other for other in range(world_size) if other != rank]
        self.look_seconds = min(LOOK_SECONDS, patience / 4)
        self.beats: dict[int, Beat] = {}
        """What each of the other ranks last said of itself, as far as that was heard."""
        self._world, self._meetings = dist.group.WORLD, 0
        self._thread = threading.current_thread()
        self._dumps = SharedFile(0)
        self._stack_file = append_to_shared(self._dumps.path)
        tell_where_on_request(self._stack_file)
        self._store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._number, self._ended = 0, ""
        self._publish()
        # Whoever waits in this one looks for the others, so torch itself need not end it.
        self._group = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        with suppress(dist.DistStoreError):  # it is slow; they are heard later
            self._hear()
        self._closing = threading.Event()
        self._exchanging = threading.Thread(target=self._exchange, name="heartbeats", daemon=True)
        self._exchanging.start()
        self._step: _Vigil | None = None
        self._lost: LostProcessError | None = None
        if on_gpus:
            threading.Thread(target=self._guard, name="guard of steps", daemon=True).start()

    def _exchange(self) -> None:
        with suppress(dist.DistNetworkError):  # the store is gone; that no news comes is for whoever waits to notice
            while not self._closing.wait(self.look_seconds):
                with suppress(dist.DistStoreError):  # it took too long to answer
                    self._publish()
                    self._hear()
            if self._ended:
                self._publish()
                time.sleep(2 * LOOK_SECONDS)  # the store may be this process's own, and the others are to read it

    def _publish(self) -> None:
        self._number += 1
        beat = Beat(
            number=self._number,
            collectives=self.collectives,
            life=sign_of_life(self._thread),
            where=call_of_thread(self._thread.ident or 0),
            ended=self._ended,
            process=os.getpid(),
            machine=_this_machine(),
            dumps=self._dumps.path,
        )
        self._store.set(_key(self.rank), json.dumps(asdict(beat)))

    def _hear(self) -> None:
        found = self._store.multi_get([_key(rank) for rank in self.others])
        self.beats = {rank: Beat(**json.loads(text)) for rank, text in zip(self.others, found, strict=True)}

    @property
    def collectives(self) -> int:
        """How many this rank has begun."""
        return self._meetings + self._world._get_sequence_number_for_group()  # pyright: ignore

    def meet(self, values: Tensor | None = None) -> None:
        """Wait for the other ranks, however long they work, and sum int64 numbers over all, in place.

        Raises:
            LostProcessError: one of them ended, or has given no sign of life for too long.
            RuntimeError: a connection broke.
        """
        self._meetings += 1
        values = torch.zeros(1, dtype=torch.int64) if values is None else values
        work, vigil = dist.all_reduce(values, group=self._group, async_op=True), _Vigil(self)
        assert work is not None
        all_here = Watch(self.patience)
        while not work.is_completed():
            with suppress(RuntimeError):  # the time is over; what else went wrong is raised below
                work.wait(timedelta(seconds=self.look_seconds))
                return
            if work.is_completed():
                break
            missing = vigil.look()
            all_here.see(time.monotonic() if missing else None)
            if all_here.longer_than(2 * self.limit):  # a rank that is silent itself has been told of by then
                raise self._cut_off(2 * self.limit)
        work.wait()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Look after the others while a step's collectives are under way."""
        self._step = _Vigil(self)
        try:
            yield
        finally:
            self._step = None

    def check(self) -> None:
        """Raise what there is to say of a rank that was lost in a step, whose collectives gave nothing that is true."""
        if self._lost is not None:
            raise self._lost

    def _guard(self) -> None:
        while not self._closing.wait(self.look_seconds):
            if (step := self._step) is None:
                continue
            try:
                step.look()
            except LostProcessError as lost:
                self._lost = lost
                self._abort()
                return

    def _abort(self) -> None:
        self._world._get_backend(torch.device("cuda")).abort()  # pyright: ignore

    def blame(self, error: RuntimeError) -> LostProcessError:
        """Returns what made a collective fail: which rank is gone, or does not answer, and where it stands."""
        if self._lost is not None:
            return self._lost
        before, end = self.beats, time.monotonic() + _NEWS_SECONDS
        while (lost := self.left()) is None and time.monotonic() < end:
            time.sleep(0.1)
        if lost is not None:
            return lost
        now, reason = self.beats, str(error).splitlines()[0]
        unheard = [rank for rank, beat in now.items() if beat == before.get(rank)]
        if timed_out(error) and now:
            behind = min(now, key=lambda rank: now[rank].collectives)
            return self.silent(unheard[0] if unheard else behind)
        return self._gone(unheard[0]) if unheard else LostProcessError(f"a connection between ranks broke: {reason}")

    def left(self) -> LostProcessError | None:
        """Returns what there is to say of a rank that has ended, or is about to, if there is one."""
        for rank, beat in self.beats.items():
            if not beat.ended and beat.machine == _this_machine() and has_ended(beat.process):
                return self._gone(rank)
        return next((LostProcessError(beat.ended) for beat in self.beats.values() if beat.ended), None)

    def _gone(self, rank: int) -> LostProcessError:
        return LostProcessError(
            f"{self.name(rank)} is gone, as when it is killed for memory; its last output tells more. Give the machine "
            "more memory, or take a smaller --batch-size"
        )

    def _cut_off(self, seconds: float) -> LostProcessError:
        return LostProcessError(
            f"all {self.world_size} ranks have come to the same point, but their connections have carried nothing for "
            f"{seconds:g} s. Look for what cuts the network between their machines, such as a firewall, or an "
            "interface that only some of them have (GLOO_SOCKET_IFNAME names one)"
        )

    @property
    def limit(self) -> float:
        """How long a rank may be without a sign of life by now, in seconds."""
        return min(self.patience, _STOP_SECONDS) if asked_to_stop() else self.patience

    def silent(self, rank: int) -> LostProcessError:
        """Returns what there is to say of a rank without a sign of life."""
        beat, where, dump = self.beats.get(rank), "", ""
        if beat is not None:
            where = beat.where
            if beat.machine == _this_machine():
                with suppress(OSError), open(beat.dumps, "rb") as file:
                    where, dump = where_it_stands(beat.process, file.read)
        if dump:
            _log.warning("rank %d of %d stands at\n%s", rank, self.world_size, dump)
        return LostProcessError(
            f"{self.name(rank)} has given no sign of life for {self.limit:g} s{f': {where}' if where else ''}. Mend "
            "what it waits for, or allow more by --patience"
        )

    def name(self, rank: int) -> str:
        """Name a rank, for messages."""
        name, beat = f"rank {rank} of {self.world_size}", self.beats.get(rank)
        return name if beat is None else f"{name} (process {beat.process} on {beat.machine.partition(' ')[0]})"

    def close(self, error: BaseException | None) -> None:
        """Say no more; tell the others first why this rank ends, if it does not end well."""
        if error is not None:
            found = error
            while isinstance(found.__cause__, LostProcessError):  # as it was found, without what was saved
                found = found.__cause__
            said = str(found) if isinstance(found, LostProcessError) else f"rank {self.rank} ended: {explain(error)}"
            self._ended = " ".join(said.split())
        self._closing.set()
        self._exchanging.join(2 * _STORE_SECONDS)

    def end_soon(self) -> None:
        """End this process with exit code 1 where it has not ended by itself in a moment.

        A thread of torch's may still wait in a collective, and Python's end would wait for that thread.
        """
        faulthandler.dump_traceback_later(_END_SECONDS, exit=True, file=self._stack_file)


class _Vigil:
    """Looks after the other ranks for as long as this one waits for them."""

    def __init__(self, heartbeats: Heartbeats) -> None:
        self._ours, patience = heartbeats, heartbeats.patience
        self._heard = {rank: Watch(patience) for rank in heartbeats.others}
        self._moving = {rank: Watch(patience) for rank in heartbeats.others}
        self._kept_waiting = Watch(patience)

    def look(self) -> list[int]:
        """Look once, about twice a second; returns the ranks that have not come as far as this one.

        Raises:
            LostProcessError: a rank ended; or its process has said nothing for too long, wherever it was; or it has not
                come as far as this one, and its training thread has done nothing for too long.
        """
        if (lost := self._ours.left()) is not None:
            raise lost
        behind = []
        for rank in self._heard:
            beat = self._ours.beats.get(rank)
            self._heard[rank].see(None if beat is None else beat.number)
            self._moving[rank].see(None if beat is None else (beat.collectives, beat.life))
            if beat is None or beat.collectives < self._ours.collectives:
                behind.append(rank)
        for rank in self._heard:
            watches = [self._heard[rank], self._moving[rank]] if rank in behind else [self._heard[rank]]
            if any(watch.longer_than(self._ours.limit) for watch in watches):
                raise self._ours.silent(rank)
        self._tell(behind)
        return behind

    def _tell(self, behind: list[int]) -> None:
        self._kept_waiting.see(None)
        if self._kept_waiting.expired and behind:
            self._kept_waiting = Watch(self._ours.patience)
            name, beat = self._ours.name(behind[0]), self._ours.beats.get(behind[0])
            where = "" if beat is None else f": {beat.where}"
            _log.warning("%s has kept the others waiting for %g s, but goes on%s", name, self._ours.patience, where)


def timed_out(error: Exception) -> bool:
    """Whether torch gave up waiting for other ranks, rather than losing a connection."""
    return "timed out" in str(error).lower() or "wait timeout" in str(error).lower()


def _key(rank: int) -> str:
    return f"heartbeats/{rank}"


@cache
def _this_machine() -> str:
    """Returns its name, and what tells it and its containers apart: a process's number means something within one."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()
