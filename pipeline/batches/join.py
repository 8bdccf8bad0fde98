"""Clips and their teacher logits → batches: reads each clip's bytes out of its shard, decodes them, adds what is known.

The logits were brought into the manifest's order once, when the store was opened, so the join of a clip is one row of a
memory-mapped array. What a batch holds depends on its rows alone, never on the number of workers.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.batches.sampling import seed_for
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_ahead, read_clip_bytes
from pipeline.dataset.views import View, ViewsStamp, apply_view, draw_view, extra_seconds, pick_views
from pipeline.errors import DecodeError, PipelineError, StorageUnavailableError, TooManyFailuresError
from pipeline.logits.alignment import AlignedLogits
from pipeline.runtime.cores import usable_cores
from pipeline.storage.cache import ShardMirror
from pipeline.storage.files import RangeReader, is_remote

_VIEW_DRAW = 2
"""Tells the draw of the views from a step's other draws, 0 and 1 (`pipeline.training.loop`)."""


@dataclass(frozen=True, slots=True)
class FailedClip:
    """A clip that could not be read or decoded."""

    row: int
    reason: str
    """A short fixed phrase that can be counted."""
    detail: str


_UNREACHABLE = "storage unavailable"


def check_reachable(failures: Iterable[FailedClip]) -> None:
    """Tell an unreachable server from clips that are no good; loader workers can only hand on what they found.

    Raises:
        StorageUnavailableError: a clip failed because of the server.
    """
    for failure in failures:
        if failure.reason == _UNREACHABLE:
            raise StorageUnavailableError(failure.detail)


@dataclass(frozen=True, slots=True)
class ViewedRows:
    """Rows of a batch to read, each in one of the clip's views."""

    rows: np.ndarray
    """(batch,), int64: rows in the manifest."""
    views: np.ndarray
    """(batch,), int64: which view of each clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """Waveforms, labels and teacher logits of some clips; tensors, on one device."""

    rows: Tensor
    """(batch,), int64: rows in the manifest."""
    waveforms: Tensor
    """(batch, samples), float32, -1 to 1; silence where the clip is not valid."""
    labels: Tensor
    """(batch, classes), float32, 0 or 1."""
    teacher_logits: Tensor
    """(batch, classes), float32; zeros where there are none."""
    has_teacher: Tensor
    """(batch,), bool."""
    valid: Tensor
    """(batch,), bool: False where the clip could not be decoded."""
    label_mask: Tensor | None = None
    """(batch, classes), bool: where the label is known; None where all are."""
    positions: Tensor
    """(batch,), int64: where the clips stand in the step's global batch, which several processes may share."""
    global_batch_size: int
    """Clips of the global batch, valid or not."""
    failures: tuple[FailedClip, ...] = ()
    """Why, for each clip that is not valid."""
    edge_shifts_hz: Tensor | None = None
    """(batch, 2): how far each clip's view moves the edges of the mel bands; None where clips are shown as they are."""

    def __len__(self) -> int:
        """Count the clips, valid or not."""
        return len(self.rows)

    def only_valid(self) -> "TrainingBatch":
        """Leave out the clips that could not be decoded, so that they touch neither statistics nor partners."""
        return self if self.valid.all() else self.only(self.valid)

    def only(self, clips: Tensor | slice) -> "TrainingBatch":
        """Take some of the clips: a mask, (batch,) bool, or a slice."""
        return replace(self, **{name: tensor[clips] for name, tensor in self._tensors().items()})

    def within(self, first: int, global_batch_size: int) -> "TrainingBatch":
        """Returns the same clips as those from position `first` on of a global batch."""
        return replace(self, positions=torch.arange(first, first + len(self)), global_batch_size=global_batch_size)

    def to(self, device: torch.device) -> "TrainingBatch":
        """Copy to a device, from pinned memory without waiting for the copy; rows and positions stay on the CPU."""
        moving = {name: tensor for name, tensor in self._tensors().items() if name not in ("rows", "positions")}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moving.items()})

    def pin_memory(self) -> "TrainingBatch":
        """Copy to page-locked memory; the loader calls this where a GPU is fed."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class JoinedDataset(Dataset[TrainingBatch]):
    """A dataset's clips joined with their teacher logits; an item is a whole batch, asked for by its rows.

    Args:
        manifest: the dataset.
        sample_rate_hz: the model's.
        seconds: the model's input length; longer clips are cut, shorter ones padded with silence.
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
        logits: AlignedLogits | None = None,
        cache: WaveformCache | None = None,
        mirror: ShardMirror | None = None,
        views: ViewsStamp | None = None,
    ) -> None:
        manifest.prepare_reads()
        self.manifest = manifest
        self.sample_rate_hz = sample_rate_hz
        self.seconds = seconds
        self._logits = logits
        self._cache = cache
        self._views = views
        self._kept_seconds = kept_seconds(seconds, views)
        self._reader = RangeReader(manifest.location, mirror)

    @property
    def samples(self) -> int:
        """Length of a waveform."""
        return round(self.seconds * self.sample_rate_hz)

    def requests(
        self, batches: Iterable[np.ndarray], *, seed: int, first_step: int
    ) -> Iterator[np.ndarray | ViewedRows]:
        """Yield the request for the rows, (batch,) int64, of each step from `first_step` on; see `request`."""
        for step, rows in enumerate(batches, start=first_step):
            yield self.request(rows, seed=seed, step=step)

    def request(self, rows: np.ndarray, *, seed: int, step: int) -> np.ndarray | ViewedRows:
        """Choose a view of each clip, where it has several: the run's seed, the step and the row decide."""
        if self._views is None:
            return rows
        return ViewedRows(rows, pick_views(rows, self._views.count, seed=seed_for(seed, step, _VIEW_DRAW)))

    def __getitem__(self, wanted: np.ndarray | ViewedRows) -> TrainingBatch:
        """Read the clips at some rows, (batch,) int64, each as it is or in the view that is asked for."""
        if is_remote(self.manifest.location):
            rows = wanted.rows if isinstance(wanted, ViewedRows) else wanted
            read_ahead(self._reader, self.manifest, self._not_kept(rows))
        return self.batch(wanted, lambda row: read_clip_bytes(self._reader, self.manifest, row))

    def batch(self, wanted: np.ndarray | ViewedRows, read: Callable[[int], bytes]) -> TrainingBatch:
        """Join the clips at some rows, (batch,) int64.

        Args:
            wanted: rows in the manifest, and which view of each clip where that matters.
            read: gives the encoded audio of one of them, or raises a `PipelineError`. It is asked in the order in which
                the clips lie in their shards, whatever the order of the rows.
        """
        rows = wanted.rows if isinstance(wanted, ViewedRows) else wanted
        views = self._draw_views(wanted)
        waveforms = _empty_for_the_main_process(len(rows), self.samples)
        samples = waveforms.numpy()
        failures: list[FailedClip] = []
        for index in np.lexsort((self.manifest.offsets[rows], self.manifest.shard_of_clip[rows])).tolist():
            row = int(rows[index])
            try:
                samples[index] = self._viewed(self._waveform(row, read), views[index] if views else None)
            except DecodeError as error:
                failures.append(FailedClip(row, error.reason, error.detail))
            except StorageUnavailableError as error:
                failures.append(FailedClip(row, _UNREACHABLE, str(error)))
            except PipelineError as error:
                failures.append(FailedClip(row, "shard unreadable", str(error)))
        valid = ~np.isin(rows, [failure.row for failure in failures])
        samples[~valid] = 0
        teacher_logits, has_teacher = self._teacher_logits(wanted)
        label_mask = self.manifest.label_mask(rows)
        return TrainingBatch(
            rows=torch.from_numpy(rows),
            waveforms=waveforms,
            labels=torch.from_numpy(self.manifest.label_matrix(rows)),
            teacher_logits=torch.from_numpy(teacher_logits),
            has_teacher=torch.from_numpy(has_teacher),
            valid=torch.from_numpy(valid),
            label_mask=None if label_mask is None else torch.from_numpy(label_mask),
            positions=torch.arange(len(rows)),
            global_batch_size=len(rows),
            failures=tuple(failures),
            edge_shifts_hz=torch.tensor([(view.low_rise_hz, view.high_rise_hz) for view in views]) if views else None,
        )

    def _draw_views(self, wanted: np.ndarray | ViewedRows) -> list[View]:
        if self._views is None or not isinstance(wanted, ViewedRows):
            return []
        ids = self.manifest.clip_ids.take(pa.array(wanted.rows)).to_pylist()
        config = self._views.config
        return [draw_view(config, clip_id, number) for clip_id, number in zip(ids, wanted.views.tolist(), strict=True)]

    def _viewed(self, waveform: np.ndarray, view: View | None) -> np.ndarray:
        if view is None:
            return waveform[: self.samples]
        return apply_view(waveform, view, sample_rate_hz=self.sample_rate_hz, samples=self.samples)

    def _not_kept(self, rows: np.ndarray) -> np.ndarray:
        cache = self._cache
        return rows if cache is None else rows[[not cache.holds(row) for row in rows.tolist()]]

    def _waveform(self, row: int, read: Callable[[int], bytes]) -> np.ndarray:
        if self._cache is not None and (kept := self._cache.read(row)) is not None:
            return kept
        waveform = load_waveform(read(row), sample_rate_hz=self.sample_rate_hz, seconds=self._kept_seconds)
        if self._cache is not None:
            self._cache.write(row, waveform)
        return waveform

    def _teacher_logits(self, wanted: np.ndarray | ViewedRows) -> tuple[np.ndarray, np.ndarray]:
        """Returns (batch, classes) float32 and (batch,) bool."""
        rows, views = (wanted.rows, wanted.views) if isinstance(wanted, ViewedRows) else (wanted, None)
        if self._logits is None:
            return np.zeros((len(rows), len(self.manifest.vocabulary)), np.float32), np.zeros(len(rows), bool)
        if views is None and self._views is not None:
            views = np.zeros(len(rows), np.int64)  # the clips as they are
        return self._logits.take(rows, views).astype(np.float32), self._logits.has_logits[rows]


def kept_seconds(seconds: float, views: ViewsStamp | None) -> float:
    """Returns how much of a clip has to be decoded for a model that listens to `seconds` of it, in any view."""
    return seconds if views is None else seconds + extra_seconds(views.config)


def loader_processes(workers: int) -> int:
    """Returns how many processes load where `workers` are asked for: no more than there are usable cores."""
    return min(workers, usable_cores())


def _empty_for_the_main_process(batch: int, samples: int) -> Tensor:
    """Returns (batch, samples) float32, any values, in memory that the main process sees too where a worker asks."""
    if get_worker_info() is None:
        return torch.empty(batch, samples)
    # As torch's own collating does it. The waveforms are written once, where they will be read: for each page that the
    # kernel has to find, zero and map, a clip pays more than for a copy.
    storage = torch.UntypedStorage._new_shared(4 * batch * samples)
    return torch.empty(0).set_(storage, 0, (batch, samples))  # pyright: ignore[reportCallIssue]


def batch_loader(
    dataset: Dataset[TrainingBatch], batches: Iterable[Any], *, workers: int, pin_memory: bool = False
) -> DataLoader[TrainingBatch]:
    """Load `dataset[batch]` for each of `batches`, in order, ahead of time on up to `workers` processes.

    With 0 workers each is loaded when it is asked for. The processes, at most one a core, live as long as the
    iteration, which may go on over any number of epochs.
    """
    return DataLoader(
        dataset,
        sampler=batches,  # pyright: ignore[reportArgumentType]
        batch_size=None,  # an index is a whole batch already
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
        num_workers=loader_processes(workers),
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=pin_memory,
    )


def _as_it_is(batch: TrainingBatch) -> TrainingBatch:
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and a service manager's SIGTERM reach the workers too. If they died of it, the main process could no
    # longer finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        return self._manifest.clip_ids[row].as_py()

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
