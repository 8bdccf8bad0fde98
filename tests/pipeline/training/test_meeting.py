"""Ranks that are started again meet afresh, whatever their predecessors left in the launcher's store."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeline.training.meeting import store_of_this_start


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store that stays, as torchrun's does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def start(port: int, world_size: int, *, absent: tuple[int, ...] = (), seconds: float = 10) -> list[dist.Store]:
    def come(rank: int) -> dist.Store:
        client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
        return store_of_this_start(client, rank, world_size, seconds)

    with ThreadPoolExecutor(world_size) as threads:
        coming = [threads.submit(come, rank) for rank in range(world_size) if rank not in absent]
        return [one.result() for one in coming]


def test_ranks_of_one_start_share_what_no_other_start_sees(port: int) -> None:
    for number in range(3):
        first, *others = start(port, 3)
        assert not first.check(["word"])
        first.set("word", str(number))
        assert [other.get("word") for other in others] == [str(number).encode()] * 2


@pytest.mark.parametrize("absent", [(0,), (1,)])
def test_a_dead_predecessor_does_not_stand_in_for_a_rank_that_never_comes(port: int, absent: tuple[int, ...]) -> None:
    start(port, 2)
    with pytest.raises(RuntimeError, match="timed out"):
        start(port, 2, absent=absent, seconds=0.5)


def test_a_start_of_another_size_meets_too(port: int) -> None:
    start(port, 3)
    assert len(start(port, 2)) == 2
