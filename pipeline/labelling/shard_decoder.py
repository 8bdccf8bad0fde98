"""Shards → batches of waveforms, in order, some batches ahead of whoever asks for them.

Clips come as long as they are: what becomes of other lengths than a teacher's is the affair of its front end.

Processes read and decode each clip once for all sample rates and views, so that the thread that launches a model's
kernels shares Python's lock with nothing but the putting together of batches. While a shard's last batches are used up,
the first ones of the shard that follows are made, so that nobody waits between two shards. Batches are fixed by the
shard's rows alone, and none holds clips of two shards.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset.clip_lengths import divide_by_length
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewsStamp, draw_view
from pipeline.decoding.pool import DecodingPool, Order, RequestQueue
from pipeline.errors import LostProcessError, PipelineError
from pipeline.labelling.clip_range import ClipRange, as_range
from pipeline.labelling.shard_fetching import ShardFetcher
from pipeline.labelling.shard_reading import DecodedClip, ShardReader, Share, Waveforms
from pipeline.labelling.stretches import Stretch
from pipeline.logits.store import ClipFailure
from pipeline.runtime.threads import Job, Threads
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.storage import files as storage

_BATCHES_AHEAD = 3
"""One being filled, one full, one in the making: enough for the model never to wait where the processes keep up."""

Following = Callable[[], ClipRange | None]
"""Says which shard or stretch comes next, as late as that can still be decoded ahead; None where nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedClips:
    """A batch of clips in one view."""

    waveforms: dict[int, Tensor]
    """Sample rate in Hz → (batch, samples), float32; zeros behind what is shorter than the longest clip."""
    lengths: dict[int, Tensor]
    """Sample rate in Hz → (batch,), int64: the samples of each clip."""
    edge_shifts_hz: Tensor | None
    """(batch, 2): how far the edges of the mel bands are moved; None where they stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """Some clips of one shard."""

    views: tuple[ViewedClips, ...]
    """The same clips, view 0 first; none where no clip could be decoded."""
    rows: list[int]
    """The clips' rows in the manifest."""
    failures: dict[int, ClipFailure]
    """Of the rows that are not in `rows`."""

    @property
    def seconds(self) -> float:
        """Length of the longest clip; 0 where there is none."""
        return max((int(its.max()) / rate for view in self.views[:1] for rate, its in view.lengths.items()), default=0)


def start_decoders(processes: int, patience: float = PATIENCE_SECONDS) -> DecodingPool:
    """Start the processes for a `ShardDecoder`, which take a while to be ready.

    Args:
        processes: how many.
        patience: how long one of them may be waited for without a sign of life, in seconds; each clip is one.

    Raises:
        LostProcessError: one can't be started.
    """
    remedy = "Give the machine more memory, or take fewer --decode-workers or a lower --batch-size"
    return DecodingPool(processes, patience=patience, remedy=remedy)


class ShardDecoder:
    """Decodes shard after shard, ahead of time.

    Args:
        manifest: the dataset.
        sample_rates_hz: every clip comes at each of these.
        seconds: how much of a clip at most; infinite for all of it.
        views: which views of a clip are made; None is the clip as it is.
        batch_size: clips a batch; the last one of a shard may have fewer, and so have those of long clips.
        processes: how many decode, or those that are started already, by `start_decoders`; they end with this.
        patience: how long one of them may be waited for without a sign of life, in seconds; each clip is one.
        pin_memory: put the batches where a GPU can fetch them by itself.

    Raises:
        LostProcessError: a process can't be started.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        sample_rates_hz: Sequence[int],
        seconds: float,
        views: ViewsStamp | None = None,
        batch_size: int,
        processes: int | DecodingPool,
        patience: float = PATIENCE_SECONDS,
        pin_memory: bool = False,
    ) -> None:
        self._manifest, self._views, self._rates_hz = manifest, views, tuple(sample_rates_hz)
        self._batch_size, self._pin_memory = batch_size, pin_memory
        pool = processes if isinstance(processes, DecodingPool) else start_decoders(processes, patience)
        self._processes, self._patience = pool.size, patience
        self._reader = ShardReader(manifest.clips, sample_rates_hz=sample_rates_hz, seconds=seconds, views=views)
        self._share = -(-batch_size // pool.size)
        """Clips of a batch that one process decodes."""
        self._pool: DecodingPool | None = pool
        self._queue: RequestQueue | None = None
        self._assembler = Threads(1, "assemble", patience=patience)
        self._fetching = Threads(2, "fetch", patience=patience) if storage.is_remote(manifest.location) else None
        self._current: _OpenShard | None = None
        self._ahead: _OpenShard | None = None

    def close(self) -> None:
        """End the processes and the thread."""
        self._let_go()
        self._assembler.close()
        if self._fetching is not None:
            self._fetching.close()

    def rows_of(self, shard: str) -> np.ndarray:
        """Returns a shard's rows, (clips,) int64, in the order of its bytes, which is that of its batches."""
        rows = self._manifest.rows_of_shard(shard)
        return rows[np.argsort(self._manifest.offsets[rows], kind="stable")]

    def batches(
        self, shard: str | ClipRange, following: str | ClipRange | Following | None = None
    ) -> Iterator[ClipBatch]:
        """Yields the batches of a shard, or of a stretch of one that begins where a batch does.

        Args:
            shard: its name in the manifest, or the stretch.
            following: what will be asked for next, if that is known, or who says so once all batches of this shard are
                in the making; its first batches are made meanwhile.

        Raises:
            LostProcessError: a process died, or does not answer; the next shard is decoded by others.
            PipelineError: the shard can't be read. A clip that can't be used raises nothing: it is in its batch's
                `failures`. What is wrong with the following shard is told when it is asked for.
        """
        current = self._begin(shard)
        try:
            while True:
                # One more than are ahead: the oldest goes to the caller at once.
                while len(current.prepared) + (len(self._ahead.prepared) if self._ahead else 0) <= _BATCHES_AHEAD:
                    if self._prepare(current):
                        continue
                    if following is not None and self._ahead is None:
                        self._ahead, following = self._try_to_open(following), None
                    if not self._prepare_ahead():
                        break
                if not current.prepared:
                    break
                yield from current.prepared.popleft().result()
        except LostProcessError:
            self._let_go()
            raise
        except PipelineError:
            self._forget()
            raise

    def _begin(self, shard: str | ClipRange) -> "_OpenShard":
        ahead, self._ahead = self._ahead, None
        wanted = self.range_of(shard)
        if (self._current is not None and self._current.prepared) or (ahead is not None and ahead.range != wanted):
            self._forget()  # what nobody asks for any more would keep its room
            ahead = None
        self._current = ahead or self._open(wanted)
        return self._current

    def range_of(self, shard: str | ClipRange) -> ClipRange:
        """Returns a shard or a stretch of one with both its bounds."""
        name = shard if isinstance(shard, str) else shard.shard
        return as_range(shard, len(self._manifest.rows_of_shard(name)))

    def _open(self, shard: str | ClipRange) -> "_OpenShard":
        wanted = self.range_of(shard)
        if self._fetching is None:
            reader = storage.RangeReader(self._manifest.location)
            reader.read(wanted.shard, 0, 1)  # says now if the tar is missing
            reader.close()
        rows = self.rows_of(wanted.shard)[wanted.start : wanted.stop].tolist()
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        fetcher = None
        if self._fetching is not None:
            fetcher = ShardFetcher(self._manifest, wanted.shard, batches, self._fetching)
        return _OpenShard(range=wanted, batches=batches, prepared=deque(), fetcher=fetcher)

    def _try_to_open(self, following: str | ClipRange | Following) -> "_OpenShard | None":
        shard = following() if callable(following) else following
        try:
            return None if shard is None else self._open(shard)
        except PipelineError:  # not this shard's affair
            return None

    def _prepare(self, shard: "_OpenShard") -> bool:
        """Have one more batch made; False where the shard has no more clips, or its bytes are still on their way."""
        number, fetched = shard.begun, None
        if number == len(shard.batches):
            return False
        if shard.fetcher is not None:
            shard.fetcher.begin(number)
            if (self._current is not shard or shard.prepared) and not shard.fetcher.is_there(number):
                return False  # there is something to do meanwhile
            fetched = shard.fetcher.take(number)
        shard.begun += 1
        rows, queue = shard.batches[number], self._open_queue()
        place = None if fetched is None else fetched.place
        shares = [Share(rows[start : start + self._share], place) for start in range(0, len(rows), self._share)]
        orders = [order for order in map(queue.put, shares) if order is not None]
        assert len(orders) == len(shares), "there is room for as many batches as are ever under way"
        # What was fetched has to live until it is decoded.
        job = self._assembler.submit(f"decoding {shard.range}", lambda: self._assemble(orders, fetched))
        shard.prepared.append(job)
        return True

    def _prepare_ahead(self) -> bool:
        """Have one more batch made of the shard that follows, if that is possible now."""
        try:
            return self._ahead is not None and self._prepare(self._ahead)
        except LostProcessError:
            raise
        except PipelineError:  # told when its turn comes
            self._ahead = None
            return False

    def _open_queue(self) -> RequestQueue:
        if self._queue is None:
            self._pool = self._pool or start_decoders(self._processes, self._patience)
            shares = -(-self._batch_size // self._share)
            self._queue = self._pool.open_queue(
                self._reader,
                (_BATCHES_AHEAD + 1) * shares,
                self._reader.result_bytes(Share(range(self._share))),
                held=shares,
            )
        return self._queue

    def _forget(self) -> None:
        """Drop all that is under way."""
        if self._queue is not None:
            self._queue.close()
        self._queue = self._current = self._ahead = None

    def _let_go(self) -> None:
        """End the processes, too; others are started when they are needed."""
        self._forget()
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def _assemble(self, orders: Sequence[Order], fetched: Stretch | None) -> list[ClipBatch]:
        """Put a batch together out of what the processes decoded, from what was fetched, if it was."""
        clips = [clip for order in orders for clip in order.result()]
        failures = {clip.row: self._failure(clip.row, *clip.failure) for clip in clips if clip.failure is not None}
        first, *others = self._divide([clip for clip in clips if clip.failure is None]) or [[]]
        return [self._batch(first, failures), *(self._batch(some, {}) for some in others)]

    def _failure(self, row: int, reason: str, detail: str) -> ClipFailure:
        return ClipFailure(clip_id=self._clip_id(row), reason=reason, detail=detail)

    def _divide(self, clips: Sequence[DecodedClip]) -> list[list[DecodedClip]]:
        """Divide clips, in their order, so that none of the batches takes more memory than one of ordinary clips."""
        seconds = [max(len(samples) / rate for rate, samples in clip.views[0].items()) for clip in clips]
        return [list(clips[some]) for some in divide_by_length(seconds, self._batch_size)]

    def _batch(self, clips: Sequence[DecodedClip], failures: dict[int, ClipFailure]) -> ClipBatch:
        rows = [clip.row for clip in clips]
        count = 0 if not rows else 1 if self._views is None else self._views.count
        views = tuple(self._stack(rows, [clip.views[number] for clip in clips], number) for number in range(count))
        return ClipBatch(views=views, rows=rows, failures=failures)

    def _stack(self, rows: Sequence[int], clips: Sequence[Waveforms], number: int) -> ViewedClips:
        waveforms = {rate: self._padded([one[rate] for one in clips]) for rate in self._rates_hz}
        lengths = {rate: torch.tensor([len(one[rate]) for one in clips]) for rate in self._rates_hz}
        if self._views is None or number == 0:  # edges that stay where they are need no banks of their own
            return ViewedClips(waveforms=waveforms, lengths=lengths, edge_shifts_hz=None)
        drawn = [draw_view(self._views.config, self._clip_id(row), number) for row in rows]
        shifts = torch.tensor([(view.low_rise_hz, view.high_rise_hz) for view in drawn]).reshape(-1, 2)
        return ViewedClips(waveforms=waveforms, lengths=lengths, edge_shifts_hz=shifts)

    def _padded(self, clips: Sequence[np.ndarray]) -> Tensor:
        """(samples,) each → (batch, samples), zeros behind the shorter ones."""
        samples = torch.empty((len(clips), max(map(len, clips))), pin_memory=self._pin_memory)
        for row, clip in zip(samples.numpy(), clips, strict=True):
            row[: len(clip)] = clip
            row[len(clip) :] = 0
        return samples

    def _clip_id(self, row: int) -> str:
        return self._manifest.clip_ids[row].as_py()


@dataclass(kw_only=True, slots=True, eq=False)
class _OpenShard:
    """A shard, or a stretch of one, whose clips are being decoded."""

    range: ClipRange
    batches: list[list[int]]
    """Rows of each batch."""
    begun: int = 0
    """How many of them processes were given."""
    fetcher: ShardFetcher | None
    """Brings the bytes of a shard behind a URL."""
    prepared: deque[Job[list[ClipBatch]]]
    """Batches made or in the making, in order; of long clips several in one."""
