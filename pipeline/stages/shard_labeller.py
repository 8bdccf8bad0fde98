"""Stage 1's unit of work: one shard in, one published part of the logit store out. It knows nothing of Ray.

Threads read and decode clips some batches ahead of the model, each clip once for all teachers. Batches are fixed by
the shard's rows alone, so the same shard always gives the same part.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

import teacher
from pipeline import storage
from pipeline.audio import load_waveforms
from pipeline.errors import CheckpointError, DecodeError, PipelineError, ShardError
from pipeline.logit_store import ClipFailure, part_stem, publish_part
from pipeline.manifest import Manifest, read_manifest
from pipeline.memory import keep_freed_memory
from pipeline.shards import read_clip_bytes
from pipeline.stages.teacher_spec import TeacherSpec
from pipeline.store_stamp import StoreStamp

_BATCHES_AHEAD = 3
"""One being filled, one full, one in the making: enough for the model never to wait where the threads keep up."""

Waveforms = dict[int, np.ndarray]
"""Sample rate in Hz → one clip, (samples,) float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabellerConfig:
    """All that one worker needs to know."""

    data: str
    """The dataset folder."""
    store: str
    """The logit store's folder."""
    teachers: tuple[TeacherSpec, ...]
    stamp: StoreStamp
    """What the parts will say made them."""
    batch_size: int
    """Clips a forward pass."""
    decode_threads: int = 0
    """0 is one for each core that torch uses."""
    device: str = "cpu"
    """Where the teachers run: cpu, cuda …"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """How one shard went."""

    shard: str
    clips: int
    """Clips tried."""
    failed: int
    """Of these, clips without logits."""
    seconds: float
    waiting_seconds: float
    """Time in which the teachers had nothing to do because the next batch was not decoded yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    waveforms: dict[int, Tensor]
    """Sample rate in Hz → (batch, samples), float32."""
    rows: list[int]
    failures: dict[int, ClipFailure]
    """Of the rows that are not in `rows`."""


class ShardLabeller:
    """Teachers, loaded once, that label shard after shard.

    Args:
        config: see `LabellerConfig`.

    Raises:
        CheckpointError: a teacher can't be loaded, or its file here is not the one that the stamp names.
        ManifestError: the dataset has no usable manifest.
    """

    def __init__(self, config: LabellerConfig) -> None:
        if config.device == "cpu":
            keep_freed_memory()
        self._config = config
        self._manifest: Manifest = read_manifest(config.data)
        teachers = [spec.load(self._manifest, config.device) for spec in config.teachers]
        for loaded, stamped in zip(teachers, config.stamp.teachers, strict=True):
            if loaded.sha256 != stamped.sha256:
                raise CheckpointError(
                    f"{loaded.source}: hashes to {loaded.sha256[:12]} on this machine, but to {stamped.sha256[:12]} "
                    "where the run was started. Give every machine the same file."
                )
        self._ensemble = teacher.Ensemble(
            [loaded.network for loaded in teachers],
            [spec.weight for spec in config.teachers],
            getattr(torch, config.stamp.precision),
        )
        self._decoders = ThreadPoolExecutor(
            config.decode_threads or torch.get_num_threads(), thread_name_prefix="decode"
        )
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")

    def close(self) -> None:
        """Stop the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._assembler.shutdown(cancel_futures=True)

    def label_shard(self, shard: str, on_progress: Callable[[int], None] = lambda clips: None) -> ShardReport:
        """Make and publish the part of one shard, replacing an older one.

        Args:
            shard: its name in the manifest.
            on_progress: told how many of the shard's clips are done, after each batch.

        Raises:
            PipelineError: the shard is not there, or the store can't be written. A bad clip raises nothing: it is
                listed in the part.
        """
        started, waiting = perf_counter(), 0.0
        rows = self._manifest.rows_of_shard(shard)
        rows = rows[np.argsort(self._manifest.offsets[rows], kind="stable")]  # shard order
        logits: list[Tensor] = []
        labelled: list[int] = []
        failures: dict[int, ClipFailure] = {}
        batches = self._batches_ahead(shard, rows)
        while True:
            asked = perf_counter()
            batch = next(batches, None)
            waiting += perf_counter() - asked
            if batch is None:
                break
            failures.update(batch.failures)
            if batch.rows:
                logits.append(self._ask_teachers(batch.waveforms))
                labelled.extend(batch.rows)
            on_progress(len(labelled) + len(failures))
        failed = self._publish(shard, rows, labelled, logits, failures)
        return ShardReport(
            shard=shard, clips=len(rows), failed=failed, seconds=perf_counter() - started, waiting_seconds=waiting
        )

    def _batches_ahead(self, shard: str, rows: np.ndarray) -> Iterator[_Batch]:
        """Give the shard's batches in order while the threads prepare the next ones."""
        size = self._config.batch_size
        reader = storage.RangeReader(self._config.data)
        reader.read(shard, 0, 1)  # says now if the tar is missing, and opens it before threads share the reader
        prepared: deque[Future[_Batch]] = deque()
        for start in range(0, len(rows), size):
            clips = [
                (row, self._decoders.submit(self._decode, reader, row)) for row in rows[start : start + size].tolist()
            ]
            prepared.append(self._assembler.submit(self._assemble, clips))
            if len(prepared) > _BATCHES_AHEAD:
                yield prepared.popleft().result()
        while prepared:
            yield prepared.popleft().result()
        reader.close()

    def _decode(self, reader: storage.RangeReader, row: int) -> Waveforms | ClipFailure:
        """Decode a clip once and bring it to every rate that a teacher wants."""
        try:
            encoded = read_clip_bytes(reader, self._manifest, row)
            return load_waveforms(
                encoded, sample_rates_hz=self._ensemble.sample_rates_hz, seconds=self._ensemble.input_seconds
            )
        except DecodeError as error:
            return self._failure(row, error.reason, error.detail)
        except ShardError as error:
            if error.__cause__ is not None:  # the storage failed, not the clip: another try may succeed
                raise
            return self._failure(row, "shard unreadable", str(error))

    def _assemble(self, clips: Sequence[tuple[int, Future[Waveforms | ClipFailure]]]) -> _Batch:
        decoded = [(row, future.result()) for row, future in clips]
        failures = {row: found for row, found in decoded if isinstance(found, ClipFailure)}
        good = [(row, found) for row, found in decoded if not isinstance(found, ClipFailure)]
        waveforms = {
            rate: torch.from_numpy(np.stack([found[rate] for _, found in good]))
            for rate in self._ensemble.sample_rates_hz
            if good
        }  # (batch, samples) each
        if self._config.device.startswith("cuda"):
            waveforms = {rate: tensor.pin_memory() for rate, tensor in waveforms.items()}
        return _Batch(waveforms=waveforms, rows=[row for row, _ in good], failures=failures)

    def _ask_teachers(self, waveforms: dict[int, Tensor]) -> Tensor:
        """Give the weighted mean of the teachers' logits: (batch, classes), float32, on the device.

        Raises:
            PipelineError: the device's memory does not suffice even for a single clip.
        """
        device = self._config.device
        on_device = {rate: tensor.to(device, non_blocking=True) for rate, tensor in waveforms.items()}
        try:
            return self._ensemble.mean(self._ensemble(on_device))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise PipelineError(
                f"the memory of {device} does not suffice for these teachers and a single clip ({reason}). Use a "
                "larger device, a lower --precision, fewer teachers, or --gpus-per-actor 1 where actors share one."
            ) from error

    def _publish(
        self,
        shard: str,
        rows: np.ndarray,
        labelled: Sequence[int],
        logits: Sequence[Tensor],
        failures: dict[int, ClipFailure],
    ) -> int:
        """Publish the part with its failures; count them."""
        stamp = self._config.stamp
        stacked = torch.cat([*logits, torch.empty(0, stamp.classes, device=self._config.device)])
        # An overflow becomes infinite here and is found in the next line.
        values = stacked.to(torch.float16).cpu().numpy()  # (labelled clips, classes)
        finite = np.all(np.isfinite(values), axis=1)  # (labelled clips,)
        bad = [row for row, good in zip(labelled, finite.tolist(), strict=True) if not good]
        failures |= {row: self._failure(row, "non-finite logits", "") for row in bad}
        kept = np.array(labelled, np.int64)[finite]
        publish_part(
            self._config.store,
            part_stem(shard),
            [self._clip_id(row) for row in kept.tolist()],
            values[finite],
            stamp,
            self._manifest.shard_identity(shard),
            [failures[row] for row in rows.tolist() if row in failures],
        )
        return len(failures)

    def _failure(self, row: int, reason: str, detail: str) -> ClipFailure:
        return ClipFailure(clip_id=self._clip_id(row), reason=reason, detail=detail)

    def _clip_id(self, row: int) -> str:
        return self._manifest.clip_ids[row].as_py()
