"""Bytes of shards behind URLs, fetched in long ranges ahead of the processes that decode them.

A request costs its latency however little it brings. So a shard's bytes come in stretches of many batches, some of them
under way at the same time, into memory that the decoding processes map.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.decoding.shared_memory import SharedFile
from pipeline.labelling.stretches import Stretch
from pipeline.runtime.threads import Job, Threads
from pipeline.storage.files import RangeReader

STRETCH_BYTES = 16 << 20
"""So much is fetched with a request, more only where a batch is larger."""
_MAX_SPREAD = 4
"""A batch whose clips lie so much further apart than they are long is read clip by clip."""
_AHEAD = 3
"""Stretches that are there or under way at the same time: with two, one is always under way."""


class ShardFetcher:
    """Fetches stretches of one shard in turn, some of them ahead of whoever asks.

    Args:
        manifest: the dataset, behind a URL.
        shard: its name.
        batches: the rows of each batch, in the order of their bytes.
        threads: do the fetching; at least two.
    """

    def __init__(self, manifest: Manifest, shard: str, batches: Sequence[Sequence[int]], threads: Threads) -> None:
        self._manifest, self._shard, self._threads = manifest, shard, threads
        self._ranges, self._stretch_of = _stretches(manifest, batches)
        self._jobs: dict[int, Job[Stretch]] = {}
        self.begin(0)

    def begin(self, batch: int) -> None:
        """Begin to fetch what a batch and those after it need."""
        following = (number for number in self._stretch_of[batch:] if number is not None)
        first = next(following, len(self._ranges))
        for number in range(first, min(first + _AHEAD, len(self._ranges))):
            if number not in self._jobs:
                offset, end = self._ranges[number]
                self._jobs[number] = self._threads.submit(
                    f"fetching {self._shard}", lambda offset=offset, end=end: self._fetch(offset, end)
                )
        for number in [number for number in self._jobs if number < first]:
            del self._jobs[number]

    def is_there(self, batch: int) -> bool:
        """Whether nobody would have to wait for a batch's bytes."""
        number = self._stretch_of[batch]
        return number is None or self._jobs[number].is_done

    def take(self, batch: int) -> Stretch | None:
        """Returns the stretch that a batch lies in, and begins with those that follow; batches are asked for in turn.

        None is a batch whose clips lie too far apart.

        Raises:
            PipelineError: the shard can't be read.
            LostProcessError: a thread stands still.
        """
        self.begin(batch)
        number = self._stretch_of[batch]
        return None if number is None else self._jobs[number].result()

    def _fetch(self, offset: int, end: int) -> Stretch:
        content = RangeReader(self._manifest.location).read(self._shard, offset, end - offset)
        memory = SharedFile(max(1, len(content)))
        if content:
            memory.map()[: len(content)] = content
        return Stretch(memory, offset, len(content))


def _stretches(manifest: Manifest, batches: Sequence[Sequence[int]]) -> tuple[list[tuple[int, int]], list[int | None]]:
    """Returns (offset, end) of each stretch, and the number of each batch's."""
    ranges: list[tuple[int, int]] = []
    stretch_of: list[int | None] = []
    for rows in batches:
        numbers = np.asarray(rows)
        start = int(manifest.offsets[numbers].min())
        end = int((manifest.offsets[numbers] + manifest.sizes[numbers]).max())
        if end - start > _MAX_SPREAD * int(manifest.sizes[numbers].sum()) + STRETCH_BYTES:
            stretch_of.append(None)
            continue
        if ranges and end - ranges[-1][0] <= STRETCH_BYTES:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((start, end))
        stretch_of.append(len(ranges) - 1)
    return ranges, stretch_of
