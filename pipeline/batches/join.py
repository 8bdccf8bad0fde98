"""Clips and their teacher logits → batches of tensors, loaded ahead of time by decoding processes.

The logits were brought into the manifest's order once, when the store was opened, so the join of a clip is one row of a
memory-mapped array.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline.batches.reading import UNREACHABLE, BatchReader, FailedClip, ReadBatch, ViewedRows, Wanted
from pipeline.batches.sampling import seed_for
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.clip_lengths import divide_by_length
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewsStamp, pick_views
from pipeline.decoding.pool import DecodingPool
from pipeline.decoding.shared_memory import Arena
from pipeline.decoding.worker import Reader
from pipeline.errors import StorageUnavailableError, TooManyFailuresError
from pipeline.logits.alignment import AlignedLogits
from pipeline.models.transfer import DeviceCopies, PackedTensors
from pipeline.runtime.cores import usable_cores
from pipeline.storage.cache import ShardMirror

_COUNTING = ("rows", "positions", "lengths", "valid")
"""Of a batch's tensors, those that a device does not need."""
MAX_SCORED = 64
"""Clips in a batch of which nothing is learned: a GPU is busy with this many."""
_CPU_SCORED, _CPU_WORKERS = 32, 4
_VIEW_DRAW = 2
"""Tells the draw of the views from a step's other draws, 0 and 1 (`pipeline.training.loop`)."""


def check_reachable(failures: Iterable[FailedClip]) -> None:
    """Tell an unreachable server from clips that are no good; decoding processes can only hand on what they found.

    Raises:
        StorageUnavailableError: a clip failed because of the server.
    """
    for failure in failures:
        if failure.reason == UNREACHABLE:
            raise StorageUnavailableError(failure.detail)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedClips:
    """Clips to be tagged, as rows of one tensor."""

    rows: Tensor
    """(batch,), int64: rows in the manifest."""
    waveforms: Tensor
    """(batch, samples), float32, -1 to 1; zeros behind clips that are shorter than the longest."""
    lengths: Tensor | None
    """(batch,), int64, on the CPU: the samples of each clip; None where all are equal."""
    valid: Tensor
    """(batch,), bool: False where the clip could not be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """Waveforms, labels and teacher logits of some clips; tensors, on one device but for those that only count."""

    rows: Tensor
    """(batch,), int64: rows in the manifest."""
    waveforms: Tensor
    """(batch, samples), float32, -1 to 1; silence where the clip is not valid. Clips that keep their `lengths` stand
    one behind the other, (samples of all,), and `padded` gives them as rows."""
    labels: Tensor
    """(batch, classes), float32, 0 or 1."""
    teacher_logits: Tensor
    """(batch, classes), float32; zeros where there are none."""
    has_teacher: Tensor
    """(batch,), bool."""
    valid: Tensor
    """(batch,), bool, on the CPU: False where the clip could not be decoded."""
    label_mask: Tensor | None = None
    """(batch, classes), bool: where the label is known; None where all are."""
    lengths: Tensor | None = None
    """(batch,), int64, on the CPU: the samples of each clip; None where all are equal."""
    positions: Tensor
    """(batch,), int64: where the clips stand in the step's global batch, which several processes may share."""
    global_batch_size: int
    """Clips of the global batch, valid or not."""
    failures: tuple[FailedClip, ...] = ()
    """Why, for each clip that is not valid."""
    edge_shifts_hz: Tensor | None = None
    """(batch, 2): how far each clip's view moves the edges of the mel bands; None where clips are shown as they are."""
    clip_weights: Tensor | None = None
    """(batch,), float32: 0 for clips that only keep the batch's shape and count nothing, 1 for others; None where all
    count."""
    packed: PackedTensors | None = None
    """Where all that a device needs lies in one piece; None where it does not."""

    @classmethod
    def of(cls, read: ReadBatch) -> "TrainingBatch":
        """Take over the arrays of a batch that was read, without a copy."""
        return cls(
            rows=torch.from_numpy(read.rows),
            waveforms=torch.from_numpy(read.waveforms),
            lengths=None if read.lengths is None else torch.from_numpy(read.lengths),
            labels=torch.from_numpy(read.labels),
            teacher_logits=torch.from_numpy(read.teacher_logits),
            has_teacher=torch.from_numpy(read.has_teacher),
            valid=torch.from_numpy(read.valid),
            label_mask=None if read.label_mask is None else torch.from_numpy(read.label_mask),
            positions=torch.arange(len(read.rows)),
            global_batch_size=len(read.rows),
            failures=read.failures,
            edge_shifts_hz=None if read.edge_shifts_hz is None else torch.from_numpy(read.edge_shifts_hz),
        )

    def __len__(self) -> int:
        """Count the clips, valid or not."""
        return len(self.rows)

    def only_valid(self) -> "TrainingBatch":
        """Leave out the clips that could not be decoded, so that they touch neither statistics nor partners."""
        return self if self.valid.all() else self.only(self.valid)

    def only(self, clips: Tensor | slice) -> "TrainingBatch":
        """Take some of the clips: a mask, (batch,) bool on the CPU, or a slice."""
        if isinstance(clips, slice) and clips == slice(0, len(self)):
            return self
        numbers = torch.arange(len(self))[clips]
        there = clips if isinstance(clips, slice) else numbers.to(self.waveforms.device)
        chosen = {
            name: tensor[clips if name in _COUNTING else there]
            for name, tensor in self._tensors().items()
            if name != "waveforms"
        }
        if self.lengths is None:
            return replace(self, waveforms=self.waveforms[there], packed=None, **chosen)
        sounds = self._sounds()
        waveforms = torch.cat([self.waveforms[:0], *(sounds[number] for number in numbers.tolist())])
        return replace(self, waveforms=waveforms, packed=None, **chosen)

    def padded(self) -> Tensor:
        """Returns the waveforms as rows, (batch, samples), with zeros behind those shorter than the longest."""
        if self.lengths is None:
            return self.waveforms
        return nn.utils.rnn.pad_sequence(self._sounds(), batch_first=True)

    def divided(self, sample_rate_hz: int) -> Iterator["PaddedClips"]:
        """Yields the clips as rows, in parts none of which takes more memory than clips of ordinary length do."""
        if self.lengths is None:
            yield PaddedClips(rows=self.rows, waveforms=self.waveforms, lengths=None, valid=self.valid)
            return
        sounds = self._sounds()
        for some in divide_by_length((self.lengths / sample_rate_hz).tolist(), len(self)):
            waveforms = nn.utils.rnn.pad_sequence(sounds[some], batch_first=True)  # (batch, samples)
            rows, valid, lengths = self.rows[some], self.valid[some], self.lengths[some]
            yield PaddedClips(rows=rows, waveforms=waveforms, lengths=lengths, valid=valid)

    def within(self, first: int, global_batch_size: int) -> "TrainingBatch":
        """Returns the same clips as those from position `first` on of a global batch."""
        return replace(self, positions=torch.arange(first, first + len(self)), global_batch_size=global_batch_size)

    def to(self, device: torch.device | DeviceCopies) -> "TrainingBatch":
        """Copy to a device; what only counts stays on the CPU."""
        copies = device if isinstance(device, DeviceCopies) else DeviceCopies(device)
        if self.packed is not None:
            packed = self.packed.over(copies)
            return replace(self, packed=packed, **packed.tensors())
        moving = self._moving()
        return replace(self, **dict(zip(moving, copies.copy(list(moving.values())), strict=True)))

    def pack(self, *, pin_memory: bool) -> "TrainingBatch":
        """Copy what a device needs into one piece, page-locked where that is a GPU; the loader calls this."""
        packed = PackedTensors.of(self._moving(), pin_memory=pin_memory)
        return replace(self, packed=packed, **packed.tensors())

    def _moving(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if name not in _COUNTING}

    def _sounds(self) -> list[Tensor]:
        return list(self.waveforms.split([] if self.lengths is None else self.lengths.tolist()))

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class JoinedDataset(Dataset[TrainingBatch]):
    """A dataset's clips joined with their teacher logits; an item is a whole batch, asked for by its rows.

    Args:
        manifest: the dataset.
        sample_rate_hz: the model's.
        seconds: the model's input length; longer clips are cut, shorter ones padded with silence.
        own_lengths: leave shorter clips as short as they are; `seconds` may then be infinite.
        logits: the teachers' logits in the manifest's order; None where nobody needs them.
        cache: keeps decoded waveforms, `kept_seconds` long; None decodes every time.
        mirror: keeps what was read of a remote dataset; None asks its server every time.
        views: which views of each clip `logits` are of; None where they are of the clips as they are.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        sample_rate_hz: int,
        seconds: float,
        own_lengths: bool = False,
        logits: AlignedLogits | None = None,
        cache: WaveformCache | None = None,
        mirror: ShardMirror | None = None,
        views: ViewsStamp | None = None,
    ) -> None:
        self.manifest = manifest
        self.reader = BatchReader(
            manifest.clips,
            sample_rate_hz=sample_rate_hz,
            seconds=seconds,
            own_lengths=own_lengths,
            logits=logits,
            cache=cache,
            mirror=mirror,
            views=views,
        )
        """Does the work, here or in decoding processes."""

    @property
    def has_logits(self) -> np.ndarray | None:
        """(clips,) bool; None where there is no store."""
        return self.reader.has_logits

    def requests(self, batches: Iterable[np.ndarray], *, seed: int, first_step: int) -> Iterator[Wanted]:
        """Yield the request for the rows, (batch,) int64, of each step from `first_step` on; see `request`."""
        for step, rows in enumerate(batches, start=first_step):
            yield self.request(rows, seed=seed, step=step)

    def request(self, rows: np.ndarray, *, seed: int, step: int) -> Wanted:
        """Choose a view of each clip, where it has several: the run's seed, the step and the row decide."""
        views = self.reader.views
        if views is None:
            return rows
        return ViewedRows(rows, pick_views(rows, views.count, seed=seed_for(seed, step, _VIEW_DRAW)))

    def __getitem__(self, wanted: Wanted) -> TrainingBatch:
        """Read the clips at some rows, (batch,) int64, each as it is or in the view that is asked for."""
        return TrainingBatch.of(self.reader.load(wanted, Arena(), lambda row: None))


def loader_processes(workers: int | None, device: torch.device | None = None) -> int:
    """Returns how many processes load: no more than there are usable cores for each of the machine's ranks.

    Args:
        workers: how many are asked for; None is what feeds `device`: a GPU all the cores, which have nothing else to
            do, a CPU, which has, up to 4.
        device: what is fed; None is a CPU.
    """
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if workers is None:
        workers = _CPU_WORKERS if device is None or device.type == "cpu" else cores
    return min(workers, cores)


def scoring_batch(batch_size: int | None, device: torch.device) -> int:
    """Returns how many clips are scored at once where `batch_size` are asked for; None is what a device likes."""
    return batch_size or (_CPU_SCORED if device.type == "cpu" else MAX_SCORED)


def batch_loader(
    dataset: JoinedDataset,
    batches: Iterable[Wanted],
    *,
    workers: int | DecodingPool | None,
    device: torch.device | None = None,
) -> Iterator[TrainingBatch]:
    """Load `dataset[batch]` for each of `batches`, in order, ahead of time.

    Args:
        dataset: the clips.
        batches: which; none is larger than the first one.
        workers: processes that load, the first batches from now on; or how many to start for as long as the iteration
            lasts, see `loader_processes`. With 0 each batch is loaded when it is asked for.
        device: where the batches go; for a GPU they are put into page-locked memory.

    Raises:
        LostProcessError: a process died or does not answer.
    """
    return load_in_pool(workers, device, lambda pool: load_batches(dataset.reader, batches, pool=pool, device=device))


def load_in_pool(
    workers: int | DecodingPool | None,
    device: torch.device | None,
    load: Callable[[DecodingPool], Iterator[TrainingBatch]],
) -> Iterator[TrainingBatch]:
    """Returns what is loaded in somebody's pool, or in one that lasts as long as the iteration; see `batch_loader`."""
    if isinstance(workers, DecodingPool):
        return load(workers)

    def load_alone() -> Iterator[TrainingBatch]:
        with DecodingPool(loader_processes(workers, device)) as pool:
            yield from load(pool)

    return load_alone()


def load_batches(
    reader: Reader,
    requests: Iterable[Any],
    *,
    pool: DecodingPool,
    processes: int | None = None,
    device: torch.device | None = None,
) -> Iterator[TrainingBatch]:
    """Load batches that a reader reads; see `batch_loader` and `DecodingPool.load`."""
    if device is None or device.type != "cuda":
        return map(TrainingBatch.of, pool.load(reader, requests, processes=processes))

    def pinned(read: ReadBatch) -> TrainingBatch:
        with torch.cuda.device(device):  # or a thread would claim memory of the first GPU
            return TrainingBatch.of(read).pack(pin_memory=True)

    return pool.load(reader, requests, processes=processes, receive=pinned)


class FailureTally:
    """Counts the clips that could not be used, each once however often it is drawn, with reasons.

    Args:
        manifest: names the clips.
        max_share: largest share, 0 to 1, of the clips drawn so far that may fail.
    """

    def __init__(self, manifest: Manifest, *, max_share: float) -> None:
        self._manifest = manifest
        self._max_share = max_share
        self._drawn = np.zeros(len(manifest), dtype=bool)
        self._failed: dict[int, tuple[str, str]] = {}

    def count(self, rows: np.ndarray, failures: Sequence[FailedClip]) -> None:
        """Count clips, (clips,) int64 rows, and those among them that failed.

        Raises:
            StorageUnavailableError: the dataset's server can't be reached, so that no clip was tried.
        """
        check_reachable(failures)
        self._drawn[rows] = True
        for failure in failures:
            self._failed.setdefault(failure.row, (failure.reason, failure.detail))

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Clip id, reason and detail of every clip that failed, by row."""
        return [(self.clip_id(row), *self._failed[row]) for row in sorted(self._failed)]

    def clip_id(self, row: int) -> str:
        """Returns the id of the clip at `row`."""
        return self._manifest.clip_id(row)

    def summary(self) -> str:
        """Returns how many clips failed, and why: `3 of 640 clips can't be used (0.5 %): 2 undecodable, …`."""
        drawn, failed = int(self._drawn.sum()), len(self._failed)
        text = f"{failed} of {drawn} clips can't be used ({100 * failed / max(drawn, 1):.1f} %)"
        reasons = Counter(reason for reason, _ in self._failed.values()).most_common()
        return f"{text}: {', '.join(f'{count} {reason}' for reason, count in reasons)}" if reasons else text

    def check(self) -> None:
        """Stop the run where too many clips failed.

        Raises:
            TooManyFailuresError: more than `max_share` of the clips drawn so far.
        """
        if len(self._failed) > self._max_share * self._drawn.sum():
            clip_id, reason, detail = self.failures[0]
            raise TooManyFailuresError(
                f"{self.summary()}; the limit is {100 * self._max_share:g} %. The first is {clip_id}: {reason} "
                f"{detail}. Mend the dataset, or allow more with --max-failed"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"drawn": torch.from_numpy(np.packbits(self._drawn)), "failed": dict(self._failed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept, of the same manifest."""
        self._drawn = np.unpackbits(state["drawn"].numpy(), count=len(self._manifest)).astype(bool)
        self._failed = dict(state["failed"])
