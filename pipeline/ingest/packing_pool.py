"""Packs shards on a Ray cluster: one task a shard, one core a task; what dies is begun again."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pipeline.runtime.ray_session  # noqa: F401  first: it sets what Ray reads while it is imported

# isort: split
import ray
from ray.exceptions import RayError

from pipeline.errors import PipelineError
from pipeline.ingest.checking import Encoding
from pipeline.ingest.packing import pack_shard
from pipeline.ingest.plan import PlannedShard
from pipeline.ingest.preparing import ClipPreparation
from pipeline.ingest.sources import Source
from pipeline.runtime.ray_pulse import PulseBoard, PulseWatch, beating
from pipeline.runtime.watching import LOOK_SECONDS

_TRIES = 3
"""How often a shard is begun whose worker gets killed, by the kernel for its memory or with its machine."""


def pack_shards(
    dataset: str,
    source: Source,
    shards: Sequence[PlannedShard],
    encode: Encoding | None,
    at_once: int | None,
    *,
    patience: float,
) -> Iterator[int]:
    """Pack shards on the running Ray; gives the number of clips of each as it is done.

    Each shard is published with its ledger by whoever packs it, so that nothing but names and labels travels. Where one
    can't be packed, those under way go on until they are done or this process ends, which Ray sees to: Ray 2.60 aborts
    a process that cancels a task which is done at that very moment ("Tried to complete task that was not pending").

    Args:
        dataset: the folder, an absolute path or a URL that all machines see.
        source: where the clips are; all machines have to see that, too.
        shards: what to pack.
        encode: what to do with the clips' bytes; None keeps them.
        at_once: how many shards are packed at the same time; None is one for each core.
        patience: how long there may be no sign of life of any of them, in seconds.

    Raises:
        LostProcessError: there was none for longer.
        PipelineError: a shard could not be packed, or Ray itself fails. What is done is kept.
    """
    limit = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
    left, under_way = deque(shards), {}
    board = _Board.remote()
    try:
        with PulseWatch(board, patience) as watch:
            while left or under_way:
                while left and len(under_way) < limit:
                    shard = left.popleft()
                    under_way[_pack.remote(dataset, source, shard.alone(), encode, patience, board)] = len(shard)
                watch.check()
                for done in ray.wait(list(under_way), num_returns=1, timeout=LOOK_SECONDS)[0]:
                    if error := cast("str", ray.get(done, timeout=patience)):
                        raise PipelineError(f"{error} The same command goes on with what is missing.")
                    yield under_way.pop(done)
    except RayError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. The same command goes on with what is missing.") from error


@ray.remote(num_cpus=1, max_retries=_TRIES - 1)
def _pack_shard(
    dataset: str, source: Source, shard: PlannedShard, encode: Encoding | None, patience: float, board: Any
) -> str:
    """Pack one shard; give what stopped it, or nothing."""
    try:
        with (
            beating(board, shard.name),
            source.open_reader() as read_clips,
            ClipPreparation(1, encode, patience=patience) as preparation,
        ):
            pack_shard(dataset, shard, read_clips, preparation)
    except Exception as error:
        message = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        return f"{shard.name}: {message}"
    return ""


_pack: Any = _pack_shard
_Board: Any = ray.remote(num_cpus=0, max_restarts=-1)(PulseBoard)
