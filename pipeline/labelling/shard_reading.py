"""Rows of a shard → waveforms as teachers hear them: what stage 1's decoding processes do.

It imports neither torch nor Arrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.dataset.audio import load_whole_waveforms
from pipeline.dataset.clip_lengths import view_samples
from pipeline.dataset.clip_table import ClipTable
from pipeline.dataset.shards import check_clip_bytes, read_ahead, read_clip_bytes
from pipeline.dataset.views import View, ViewsStamp, apply_view, draw_view, extra_seconds
from pipeline.decoding.shared_memory import Arena
from pipeline.errors import DecodeError, ShardError
from pipeline.labelling.stretches import StretchPlace
from pipeline.storage.files import RangeReader, is_remote

_ROOM_SECONDS = 30.0
"""So much room a clip is given where teachers hear all of it; a longer one comes through a pipe, which is slower."""

Waveforms = dict[int, np.ndarray]
"""Sample rate in Hz → one view of a clip, (samples,) float32."""
Failure = tuple[str, str]
"""Reason and detail of a clip that can't be used."""


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """What became of a clip."""

    row: int
    """In the manifest."""
    views: list[Waveforms]
    """View 0 first; none where it can't be used."""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What a process is asked for: some clips of a batch."""

    rows: Sequence[int]
    """In the manifest."""
    fetched: StretchPlace | None = None
    """Where their bytes are, if they were fetched already."""


class ShardReader:
    """Decodes clips once for all sample rates and views, as long as they are.

    Args:
        clips: the dataset's.
        sample_rates_hz: every clip comes at each of these.
        seconds: how much of a clip at most; infinite for all of it.
        views: which views of a clip are made; None is the clip as it is.
    """

    def __init__(
        self, clips: ClipTable, *, sample_rates_hz: Sequence[int], seconds: float, views: ViewsStamp | None
    ) -> None:
        self._clips, self._views = clips, views
        self._rates_hz, self._seconds = tuple(sample_rates_hz), seconds
        self._files = RangeReader(clips.location)

    def load(self, request: Share | Sequence[int], arena: Arena, at: Callable[[int], None]) -> list[DecodedClip]:
        """Decode some clips, given as their rows or as a share.

        Raises:
            PipelineError: the storage fails, so that no clip is to blame.
        """
        share = request if isinstance(request, Share) else Share(request)
        rows, contents = share.rows, [None] * len(share.rows)
        if share.fetched is not None:
            ranges = [(int(self._clips.offsets[row]), int(self._clips.sizes[row])) for row in rows]
            contents = share.fetched.read(ranges)
        elif is_remote(self._clips.location):
            read_ahead(self._files, self._clips, np.array(rows))
        decoded = []
        for row, content in zip(rows, contents, strict=True):
            at(row)
            decoded.append(self._decode(row, content))
        return decoded

    def result_bytes(self, request: Share | Sequence[int]) -> int:
        """Returns how much memory the waveforms of some clips take, unless teachers hear all of very long ones."""
        views = 1 if self._views is None else self._views.count
        seconds = _ROOM_SECONDS if math.isinf(self._seconds) else self._seconds
        # Each array begins where vector instructions like it, and rates are rounded.
        clips = len(request.rows if isinstance(request, Share) else request)
        return clips * views * sum(4 * round(seconds * rate) + 128 for rate in self._rates_hz)

    def name_of(self, row: int) -> str:
        """Returns a clip's id and shard."""
        return f"{self._clips.clip_id(row)} of {self._clips.shards[self._clips.shard_of_clip[row]]}"

    def _decode(self, row: int, content: bytes | None) -> DecodedClip:
        extra = 0.0 if self._views is None else extra_seconds(self._views.config)
        try:
            if content is None:
                encoded = read_clip_bytes(self._files, self._clips, row)
            else:
                check_clip_bytes(self._clips, row, encoded := content)
            waveforms = load_whole_waveforms(encoded, sample_rates_hz=self._rates_hz, max_seconds=self._seconds + extra)
        except DecodeError as error:
            return DecodedClip(row, [], (error.reason, error.detail))
        except ShardError as error:
            if error.__cause__ is not None:  # the storage failed, not the clip: another try may succeed
                raise
            return DecodedClip(row, [], ("shard unreadable", str(error)))
        if self._views is None:
            return DecodedClip(row, [waveforms])
        drawn = [draw_view(self._views.config, self._clips.clip_id(row), number) for number in range(self._views.count)]
        return DecodedClip(
            row, [{rate: self._view(waveforms[rate], view, rate) for rate in waveforms} for view in drawn]
        )

    def _view(self, waveform: np.ndarray, view: View, rate: int) -> np.ndarray:
        """Make a view that ends with its sound, or where no teacher hears it any more."""
        samples = view_samples(len(waveform), view.shift_ms, sample_rate_hz=rate, seconds=self._seconds)
        return apply_view(waveform, view, sample_rate_hz=rate, samples=samples)
