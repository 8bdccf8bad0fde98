"""Shards → batches of waveforms, in order, some batches ahead of whoever asks for them.

Clips come as long as they are: what becomes of other lengths than a teacher's is the affair of its front end.

Threads read and decode each clip once for all sample rates and views. While a shard's last batches are used up, the
first ones of the shard that follows are made, so that nobody waits between two shards. Batches are fixed by the shard's
rows alone, and none holds clips of two shards.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset.audio import load_whole_waveforms
from pipeline.dataset.clip_lengths import divide_by_length, view_samples
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.dataset.views import View, ViewsStamp, apply_view, draw_view, extra_seconds
from pipeline.errors import DecodeError, PipelineError, ShardError
from pipeline.logits.store import ClipFailure
from pipeline.storage import files as storage

_BATCHES_AHEAD = 3
"""One being filled, one full, one in the making: enough for the model never to wait where the threads keep up."""

Waveforms = dict[int, np.ndarray]
"""Sample rate in Hz → one view of a clip, (samples,) float32."""
Decoded = tuple[int, list[Waveforms]]
"""A clip's row and views."""


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


class ShardDecoder:
    """Decodes shard after shard, ahead of time.

    Args:
        manifest: the dataset.
        sample_rates_hz: every clip comes at each of these.
        seconds: how much of a clip at most; infinite for all of it.
        views: which views of a clip are made; None is the clip as it is.
        batch_size: clips a batch; the last one of a shard may have fewer, and so have those of long clips.
        threads: how many decode.
        pin_memory: put the batches where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        sample_rates_hz: Sequence[int],
        seconds: float,
        views: ViewsStamp | None = None,
        batch_size: int,
        threads: int,
        pin_memory: bool = False,
    ) -> None:
        self._manifest, self._views = manifest, views
        self._rates_hz, self._seconds = tuple(sample_rates_hz), seconds
        self._batch_size, self._pin_memory = batch_size, pin_memory
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._ahead: _OpenShard | None = None

    def close(self) -> None:
        """Stop the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._assembler.shutdown(cancel_futures=True)

    def rows_of(self, shard: str) -> np.ndarray:
        """Returns a shard's rows, (clips,) int64, in the order of its bytes, which is that of its batches."""
        rows = self._manifest.rows_of_shard(shard)
        return rows[np.argsort(self._manifest.offsets[rows], kind="stable")]

    def batches(self, shard: str, following: str | None = None) -> Iterator[ClipBatch]:
        """Yields a shard's batches.

        Args:
            shard: its name in the manifest.
            following: the shard that will be asked for next, if that is known; its first batches are made meanwhile.

        Raises:
            PipelineError: the shard can't be read. A clip that can't be used raises nothing: it is in its batch's
                `failures`. What is wrong with the following shard is told when it is asked for.
        """
        current = self._ahead if self._ahead is not None and self._ahead.shard == shard else self._open(shard)
        self._ahead = None
        while True:
            # One more than are ahead: the oldest goes to the caller at once.
            while len(current.prepared) + (len(self._ahead.prepared) if self._ahead else 0) <= _BATCHES_AHEAD:
                if self._prepare(current):
                    continue
                if following is not None and self._ahead is None:
                    self._ahead, following = self._try_to_open(following), None
                if self._ahead is None or not self._prepare(self._ahead):
                    break
            if not current.prepared:
                break
            yield from current.prepared.popleft().result()
        current.reader.close()

    def _open(self, shard: str) -> "_OpenShard":
        reader = storage.RangeReader(self._manifest.location)
        reader.read(shard, 0, 1)  # says now if the tar is missing, and opens it before threads share the reader
        return _OpenShard(shard=shard, reader=reader, rows=deque(self.rows_of(shard).tolist()), prepared=deque())

    def _try_to_open(self, shard: str) -> "_OpenShard | None":
        try:
            return self._open(shard)
        except PipelineError:  # not this shard's affair
            return None

    def _prepare(self, shard: "_OpenShard") -> bool:
        """Submit one more batch to the threads; False where the shard has no more clips."""
        rows = [shard.rows.popleft() for _ in range(min(self._batch_size, len(shard.rows)))]
        clips = [(row, self._decoders.submit(self._decode, shard.reader, row)) for row in rows]
        if clips:
            shard.prepared.append(self._assembler.submit(self._assemble, clips))
        return bool(clips)

    def _decode(self, reader: storage.RangeReader, row: int) -> list[Waveforms] | ClipFailure:
        """Decode a clip once, bring it to every rate that is wanted, and make its views."""
        extra = 0.0 if self._views is None else extra_seconds(self._views.config)
        try:
            encoded = read_clip_bytes(reader, self._manifest, row)
            waveforms = load_whole_waveforms(encoded, sample_rates_hz=self._rates_hz, max_seconds=self._seconds + extra)
        except DecodeError as error:
            return ClipFailure(clip_id=self._clip_id(row), reason=error.reason, detail=error.detail)
        except ShardError as error:
            if error.__cause__ is not None:  # the storage failed, not the clip: another try may succeed
                raise
            return ClipFailure(clip_id=self._clip_id(row), reason="shard unreadable", detail=str(error))
        if self._views is None:
            return [waveforms]
        drawn = [draw_view(self._views.config, self._clip_id(row), number) for number in range(self._views.count)]
        return [{rate: self._view(waveforms[rate], view, rate) for rate in self._rates_hz} for view in drawn]

    def _view(self, waveform: np.ndarray, view: View, rate: int) -> np.ndarray:
        """Make a view that ends with its sound, or where no teacher hears it any more."""
        samples = view_samples(len(waveform), view.shift_ms, sample_rate_hz=rate, seconds=self._seconds)
        return apply_view(waveform, view, sample_rate_hz=rate, samples=samples)

    def _assemble(self, clips: Sequence[tuple[int, Future[list[Waveforms] | ClipFailure]]]) -> list[ClipBatch]:
        decoded = [(row, future.result()) for row, future in clips]
        failures = {row: found for row, found in decoded if isinstance(found, ClipFailure)}
        good = [(row, found) for row, found in decoded if not isinstance(found, ClipFailure)]
        first, *others = self._divide(good) or [[]]
        return [self._batch(first, failures), *(self._batch(some, {}) for some in others)]

    def _divide(self, clips: Sequence[Decoded]) -> list[list[Decoded]]:
        """Divide clips, in their order, so that none of the batches takes more memory than one of ordinary clips."""
        seconds = [max(len(samples) / rate for rate, samples in views[0].items()) for _, views in clips]
        return [list(clips[some]) for some in divide_by_length(seconds, self._batch_size)]

    def _batch(self, clips: Sequence[Decoded], failures: dict[int, ClipFailure]) -> ClipBatch:
        rows = [row for row, _ in clips]
        count = 0 if not rows else 1 if self._views is None else self._views.count
        views = tuple(self._stack(rows, [views[number] for _, views in clips], number) for number in range(count))
        return ClipBatch(views=views, rows=rows, failures=failures)

    def _stack(self, rows: Sequence[int], clips: Sequence[Waveforms], number: int) -> ViewedClips:
        waveforms = {rate: _padded([one[rate] for one in clips]) for rate in self._rates_hz}  # (batch, samples) each
        if self._pin_memory:
            waveforms = {rate: tensor.pin_memory() for rate, tensor in waveforms.items()}
        lengths = {rate: torch.tensor([len(one[rate]) for one in clips]) for rate in self._rates_hz}
        if self._views is None or number == 0:  # edges that stay where they are need no banks of their own
            return ViewedClips(waveforms=waveforms, lengths=lengths, edge_shifts_hz=None)
        drawn = [draw_view(self._views.config, self._clip_id(row), number) for row in rows]
        shifts = torch.tensor([(view.low_rise_hz, view.high_rise_hz) for view in drawn]).reshape(-1, 2)
        return ViewedClips(waveforms=waveforms, lengths=lengths, edge_shifts_hz=shifts)

    def _clip_id(self, row: int) -> str:
        return self._manifest.clip_ids[row].as_py()


def _padded(clips: Sequence[np.ndarray]) -> Tensor:
    """(samples,) each → (batch, samples), zeros behind the shorter ones."""
    samples = np.zeros((len(clips), max(map(len, clips))), dtype=np.float32)
    for row, clip in zip(samples, clips, strict=True):
        row[: len(clip)] = clip
    return torch.from_numpy(samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OpenShard:
    """A shard whose clips are being decoded."""

    shard: str
    reader: storage.RangeReader
    rows: deque[int]
    """Of the clips that no thread was given yet."""
    prepared: deque[Future[list[ClipBatch]]]
    """Batches made or in the making, in order; of long clips several in one."""
