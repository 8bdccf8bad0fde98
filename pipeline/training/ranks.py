"""The processes that train one model together, one a GPU: who they are, and what they tell each other.

`torchrun` and Ray Train start them and say through the environment which is which. Without either there is one, and
nothing here does anything. What they agree on between steps goes over the CPU, so a GPU never waits for it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import LostProcessError, PipelineError, UsageError
from pipeline.models.device import choose_device
from pipeline.runtime.stopping import StopRequestedError
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.training.heartbeats import Heartbeats, timed_out
from pipeline.training.meeting import is_kept_between_starts, store_of_this_start

T = TypeVar("T")

LAUNCH_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Of the environment: what all starts of the ranks by one launcher have in common. torchrun sets it."""
_NO_LAUNCH = "none"
"""What torchrun calls a launch that was given no --rdzv-id, as are all such."""
_START_SECONDS = 60.0
"""How long a rank may at least take to start, which is no matter of its signs of life."""
_ENDED_GROUPS: list[object] = []


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together; they all have to call its collectives, and in the same order."""

    rank: int = 0
    """From 0; the first one writes the files."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """This one's number on its own machine, from 0: which GPU is its."""
    heartbeats: Heartbeats | None = field(default=None, repr=False, compare=False)
    """Looks after the others, if there are any."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def micro_batches(self, global_batch_size: int, accumulate: int = 1) -> list[slice]:
        """Returns this rank's positions in a global batch, a slice for each of its `accumulate` micro-batches.

        Pairs of neighbours are mixed with each other (mixup), so every slice begins at an even position. Together the
        micro-batches of all ranks are the global batch, each position once; sizes differ by two at most.
        """
        pairs, parts = (global_batch_size + 1) // 2, self.world_size * accumulate
        bounds = [min(2 * (pairs * part // parts), global_batch_size) for part in range(parts + 1)]
        first = self.rank * accumulate
        return [slice(bounds[part], bounds[part + 1]) for part in range(first, first + accumulate)]

    def device(self, name: str) -> torch.device:
        """Choose this process's device: `name`, and where that leaves it open, the GPU with this process's number.

        Raises:
            UsageError: there is no such device on this machine.
        """
        device = choose_device(name)
        if device.type == "mps" and self.world_size > 1:  # torch has no way for Apple's GPUs to train together
            device = torch.device("cpu")
        if device.type != "cuda" or self.world_size == 1:
            return device
        if device.index is None:
            device = torch.device("cuda", self.local_rank)
            choose_device(str(device))
        torch.cuda.set_device(device)
        return device

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let a step's collectives fail with a word about who is to blame, and end them where they would not.

        Raises:
            LostProcessError: another rank is gone or does not answer.
        """
        if self.heartbeats is None:
            yield
            return
        with self.collectives(), self.heartbeats.step():
            yield

    def check(self) -> None:
        """Check that what a step's collectives gave is true, before a weight is changed by it.

        Raises:
            LostProcessError: another rank was lost meanwhile.
        """
        if self.heartbeats is not None:
            self.heartbeats.check()

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Let torch's collectives in the block fail with a word about who is to blame.

        Raises:
            LostProcessError: another rank is gone or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            of_a_collective = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
            if self.heartbeats is None or not of_a_collective:
                raise
            raise self.heartbeats.blame(error) from error

    def all_reduce(self, values: Sequence[int]) -> list[int]:
        """Sum whole numbers over the processes.

        Raises:
            LostProcessError: another rank is gone or does not answer.
        """
        if self.heartbeats is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64)
        with self.collectives():
            self.heartbeats.meet(sums)
        return sums.tolist()

    def go_on_together(self, problem: Exception | None, values: Sequence[int] = ()) -> list[int]:
        """Sum whole numbers over the processes, unless one of them can't go on: then all raise what stopped it.

        Args:
            problem: why this process can't go on: a StopRequestedError, a LostProcessError, or None.
            values: the numbers.

        Raises:
            LostProcessError: a process that works for one of them is gone or does not answer, or one of themselves.
            StopRequestedError: one of them was asked to end.
        """
        stops, losses, *sums = self.all_reduce(
            [isinstance(problem, StopRequestedError), isinstance(problem, LostProcessError), *values]
        )
        if losses:
            raise next(error for error in self.all_gather(problem) if isinstance(error, LostProcessError))
        if stops:
            raise StopRequestedError
        return sums

    def all_reduce_tensor(self, value: Tensor) -> Tensor:
        """Sum a tensor, on whatever device it is, over the processes; gives it back, changed in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def all_gather(self, value: T) -> list[T]:
        """Returns every rank's value, in their order, to all of them.

        Raises:
            LostProcessError: another rank is gone or does not answer.
        """
        if self.heartbeats is None:
            return [value]
        values: list[T | None] = [None] * self.world_size
        with self.collectives():
            self.heartbeats.meet()
            dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank and broadcast its result; what it raises is raised on all.

        Raises:
            PipelineError: whatever `make` raises.
            LostProcessError: another rank is gone or does not answer.
        """
        if self.heartbeats is None:
            return make()
        made: list[tuple[T | None, PipelineError | None]] = [(None, None)]
        if self.is_first:
            try:
                made = [(make(), None)]
            except PipelineError as error:
                made = [(None, error)]
        with self.collectives():
            self.heartbeats.meet()
            dist.broadcast_object_list(made, src=0)
        value, error = made[0]
        if error is not None:
            raise error
        return cast("T", value)


@contextmanager
def process_group(patience: float = PATIENCE_SECONDS, device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that were started together, if there are others, for as long as the block lasts.

    Args:
        patience: how long one of them may be waited for without a sign of life, in seconds.
        device: what they are to train on.

    Raises:
        UsageError: the environment speaks of other processes, but they can't be reached.
        LostProcessError: not all of them came.
    """
    ours = not dist.is_initialized()  # Ray Train does it by itself
    if ours and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if ours:
        _join(patience, device)
    world = dist.group.WORLD
    assert world is not None
    # A step's collectives have a limit, for between them ranks only compute. NCCL would end the process at once when it
    # is passed, so there it comes last: heartbeats abort them before.
    on_gpus = "nccl" in dist.get_backend_config()
    world.set_timeout(timedelta(seconds=2 * start_seconds(patience) if on_gpus else patience))
    heartbeats = Heartbeats(dist.get_rank(), dist.get_world_size(), patience, on_gpus=on_gpus)
    error: BaseException | None = None
    try:
        yield Ranks(heartbeats.rank, heartbeats.world_size, int(os.environ.get("LOCAL_RANK", "0")), heartbeats)
    except BaseException as raised:
        error = raised
        raise
    finally:
        heartbeats.close(error)
        if ours:
            if isinstance(error, LostProcessError):
                heartbeats.end_soon()
            # Whoever drops a group's last reference waits for its threads. DistributedDataParallel's C++ part would do
            # that while it holds Python's lock, which those threads may need: the process would never end.
            _ENDED_GROUPS.extend((world, heartbeats))
            dist.destroy_process_group()


def launch_id() -> str | None:
    """Returns what tells this launch of ranks from others, however often it starts them; None where nothing does."""
    found = os.environ.get(LAUNCH_VARIABLE)
    return None if found == _NO_LAUNCH else found


def start_seconds(patience: float) -> float:
    """Returns how long the ranks wait for all of them to start, in seconds."""
    return max(patience, _START_SECONDS)


def _join(patience: float, device: str) -> None:
    seconds = start_seconds(patience)
    try:
        names, limit = backend(on_gpus=device != "cpu" and torch.cuda.is_available()), timedelta(seconds=seconds)
        if not is_kept_between_starts():
            dist.init_process_group(names, timeout=limit)
            return
        kept, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        store = store_of_this_start(kept, rank, world_size, seconds)
        dist.init_process_group(names, store=store, rank=rank, world_size=world_size, timeout=limit)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if not timed_out(error):
            raise UsageError(
                f"the processes of this run can't find each other; start them with torchrun: {reason}"
            ) from error
        environment = os.environ
        raise LostProcessError(
            f"not all of the {environment['WORLD_SIZE']} ranks met at {environment.get('MASTER_ADDR')}:"
            f"{environment.get('MASTER_PORT')} within {seconds:g} s, of which this is rank {environment.get('RANK')}. "
            "Start all of them, at an address that all can reach, or allow more by --patience"
        ) from error


def backend(*, on_gpus: bool) -> str:
    """Returns the names of torch's backends for ranks that each have a GPU, or none: NCCL's and Gloo's."""
    return "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
