"""Rows of a dataset → arrays: reads each clip's bytes out of its shard, decodes them, adds labels and teacher logits.

This is what decoding processes do: it imports neither torch nor Arrow, and is pickled small. What a batch holds depends
on its rows alone, never on the number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.audio import load_waveform, load_whole_waveforms
from pipeline.dataset.clip_lengths import ORDINARY_SECONDS, view_samples
from pipeline.dataset.clip_table import ClipTable
from pipeline.dataset.shards import read_ahead, read_clip_bytes
from pipeline.dataset.views import View, ViewsStamp, apply_view, draw_view, extra_seconds
from pipeline.decoding.shared_memory import Arena
from pipeline.errors import DecodeError, PipelineError, StorageUnavailableError
from pipeline.logits.alignment import AlignedLogits
from pipeline.storage.cache import ShardMirror
from pipeline.storage.files import RangeReader, is_remote

UNREACHABLE = "storage unavailable"
"""The reason of a clip that nobody could try to read."""


@dataclass(frozen=True, slots=True)
class FailedClip:
    """A clip that could not be read or decoded."""

    row: int
    reason: str
    """A short fixed phrase that can be counted."""
    detail: str


@dataclass(frozen=True, slots=True)
class ViewedRows:
    """Rows of a batch to read, each in one of the clip's views."""

    rows: np.ndarray
    """(batch,), int64: rows in the manifest."""
    views: np.ndarray
    """(batch,), int64: which view of each clip."""


_SILENCE = np.zeros(1, np.float32)

Wanted = np.ndarray | ViewedRows
"""Rows of a batch, (batch,) int64, and which view of each clip where that matters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBatch:
    """Waveforms, labels and teacher logits of some clips, as arrays."""

    rows: np.ndarray
    """(batch,), int64: rows in the manifest."""
    waveforms: np.ndarray
    """(batch, samples), float32, -1 to 1; silence where the clip is not valid. Clips that keep their `lengths` stand
    one behind the other: (samples of all,)."""
    lengths: np.ndarray | None
    """(batch,), int64: the samples of each clip, one of silence where it is not valid; None where all are equal."""
    labels: np.ndarray
    """(batch, classes), float32, 0 or 1."""
    teacher_logits: np.ndarray
    """(batch, classes), float32; zeros where there are none."""
    has_teacher: np.ndarray
    """(batch,), bool."""
    valid: np.ndarray
    """(batch,), bool: False where the clip could not be decoded."""
    label_mask: np.ndarray | None
    """(batch, classes), bool: where the label is known; None where all are."""
    edge_shifts_hz: np.ndarray | None
    """(batch, 2), int64: how far each clip's view moves the edges of the mel bands; None where they stay."""
    failures: tuple[FailedClip, ...]
    """Why, for each clip that is not valid."""


class BatchReader:
    """Reads batches of a dataset's clips.

    Args:
        clips: the dataset's.
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
        clips: ClipTable,
        *,
        sample_rate_hz: int,
        seconds: float,
        own_lengths: bool = False,
        logits: AlignedLogits | None = None,
        cache: WaveformCache | None = None,
        mirror: ShardMirror | None = None,
        views: ViewsStamp | None = None,
    ) -> None:
        self.clips = clips
        self.sample_rate_hz = sample_rate_hz
        self.seconds = seconds
        self.own_lengths = own_lengths
        self.views = views
        self._logits = logits
        self._cache = cache
        self._kept_seconds = kept_seconds(seconds, views)
        self._files = RangeReader(clips.location, mirror)

    @property
    def has_logits(self) -> np.ndarray | None:
        """(clips,) bool; None where nobody needs logits."""
        return None if self._logits is None else self._logits.has_logits

    def load(self, request: Wanted, arena: Arena, at: Callable[[int], None]) -> ReadBatch:
        """Read the clips at some rows, each as it is or in the view that is asked for."""
        if is_remote(self.clips.location):
            rows = request.rows if isinstance(request, ViewedRows) else request
            read_ahead(self._files, self.clips, self._not_kept(rows))
        return self.join(request, lambda row: read_clip_bytes(self._files, self.clips, row), arena, at)

    def result_bytes(self, request: Wanted) -> int:
        """Returns how much memory the arrays of a batch take, and some more for what goes with them."""
        clips = len(request.rows if isinstance(request, ViewedRows) else request)
        samples = round(min(self.seconds, ORDINARY_SECONDS) * self.sample_rate_hz)  # what is longer takes a slower way
        return clips * (4 * samples + 9 * self.clips.classes + 64) + 4096

    def name_of(self, row: int) -> str:
        """Returns a clip's id."""
        return self.clips.clip_id(row)

    def join(
        self,
        wanted: Wanted,
        read: Callable[[int], bytes],
        arena: Arena | None = None,
        at: Callable[[int], None] = lambda row: None,
    ) -> ReadBatch:
        """Join the clips at some rows.

        Args:
            wanted: rows in the manifest.
            read: gives the encoded audio of one of them, or raises a `PipelineError`. It is asked in the order in which
                the clips lie in their shards, whatever the order of the rows.
            arena: takes the waveforms.
            at: told each row before it is read.
        """
        rows = wanted.rows if isinstance(wanted, ViewedRows) else wanted
        views = self._draw_views(wanted)
        sounds = _Sounds(len(rows), None if self.own_lengths else self._length(0), arena or Arena())
        failures: list[FailedClip] = []
        for index in np.lexsort((self.clips.offsets[rows], self.clips.shard_of_clip[rows])).tolist():
            row = int(rows[index])
            at(row)
            try:
                sounds.put(index, self._viewed(self._waveform(row, read), views[index] if views else None))
            except DecodeError as error:
                failures.append(FailedClip(row, error.reason, error.detail))
            except StorageUnavailableError as error:
                failures.append(FailedClip(row, UNREACHABLE, str(error)))
            except PipelineError as error:
                failures.append(FailedClip(row, "shard unreadable", str(error)))
        valid = ~np.isin(rows, [failure.row for failure in failures])
        waveforms, lengths = sounds.finish(valid)
        teacher_logits, has_teacher = self._teacher_logits(wanted)
        return ReadBatch(
            rows=rows,
            waveforms=waveforms,
            lengths=lengths,
            labels=self.clips.label_matrix(rows),
            teacher_logits=teacher_logits,
            has_teacher=has_teacher,
            valid=valid,
            label_mask=self.clips.label_mask(rows),
            edge_shifts_hz=np.array([(view.low_rise_hz, view.high_rise_hz) for view in views]) if views else None,
            failures=tuple(failures),
        )

    def _draw_views(self, wanted: Wanted) -> list[View]:
        if self.views is None or not isinstance(wanted, ViewedRows):
            return []
        config, numbered = self.views.config, zip(wanted.rows.tolist(), wanted.views.tolist(), strict=True)
        return [draw_view(config, self.clips.clip_id(row), number) for row, number in numbered]

    def _viewed(self, waveform: np.ndarray, view: View | None) -> np.ndarray:
        samples = self._length(len(waveform), view)
        if view is None:
            return waveform[:samples]
        return apply_view(waveform, view, sample_rate_hz=self.sample_rate_hz, samples=samples)

    def _length(self, samples: int, view: View | None = None) -> int:
        """Returns how long the waveform of a clip of so many samples is."""
        if not self.own_lengths:
            return round(self.seconds * self.sample_rate_hz)
        shift_ms = 0 if view is None else view.shift_ms
        return view_samples(samples, shift_ms, sample_rate_hz=self.sample_rate_hz, seconds=self.seconds)

    def _not_kept(self, rows: np.ndarray) -> np.ndarray:
        cache = self._cache
        return rows if cache is None else rows[[not cache.holds(row) for row in rows.tolist()]]

    def _waveform(self, row: int, read: Callable[[int], bytes]) -> np.ndarray:
        if self._cache is not None and (kept := self._cache.read(row)) is not None:
            return kept
        encoded, rate, seconds = read(row), self.sample_rate_hz, self._kept_seconds
        if self.own_lengths:
            waveform = load_whole_waveforms(encoded, sample_rates_hz=(rate,), max_seconds=seconds)[rate]
        else:
            waveform = load_waveform(encoded, sample_rate_hz=rate, seconds=seconds)
        return waveform if self._cache is None else self._cache.write(row, waveform)

    def _teacher_logits(self, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
        """Returns (batch, classes) float32 and (batch,) bool."""
        rows, views = (wanted.rows, wanted.views) if isinstance(wanted, ViewedRows) else (wanted, None)
        if self._logits is None:
            return np.zeros((len(rows), self.clips.classes), np.float32), np.zeros(len(rows), bool)
        if views is None and self.views is not None:
            views = np.zeros(len(rows), np.int64)  # the clips as they are
        return self._logits.take(rows, views).astype(np.float32), self._logits.has_logits[rows]


class _Sounds:
    """The waveforms of a batch in the making: of one length, or each of its own.

    Args:
        clips: how many.
        samples: the length; None where each has its own.
        arena: takes the waveforms.
    """

    def __init__(self, clips: int, samples: int | None, arena: Arena) -> None:
        self._arena = arena
        self._own = [_SILENCE] * clips if samples is None else None
        # Written once, where they will be read: for each page that the kernel has to find, zero and map, a clip pays
        # more than for a copy.
        self._equal = None if samples is None else arena.empty((clips, samples), np.float32)

    def put(self, index: int, waveform: np.ndarray) -> None:
        """Take a clip's waveform, (samples,)."""
        if self._equal is not None:
            self._equal[index] = waveform
        elif self._own is not None and len(waveform):
            self._own[index] = waveform

    def finish(self, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns waveforms and lengths as `ReadBatch` has them; clips that are not `valid`, (batch,), are silent."""
        if self._equal is not None:
            self._equal[~valid] = 0
            return self._equal, None
        assert self._own is not None
        lengths = np.array([len(waveform) for waveform in self._own], np.int64)
        waveforms = self._arena.empty((int(lengths.sum()),), np.float32)
        np.concatenate([*self._own, waveforms[:0]], out=waveforms)
        return waveforms, lengths


def kept_seconds(seconds: float, views: ViewsStamp | None) -> float:
    """Returns how much of a clip has to be decoded for a model that listens to `seconds` of it, in any view."""
    return seconds if views is None else seconds + extra_seconds(views.config)
