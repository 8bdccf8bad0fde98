"""Stage 1's unit of work: one shard in, one published part of the logit store out. It knows nothing of Ray."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import teacher
from pipeline.dataset.clip_lengths import ORDINARY_SECONDS
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import CheckpointError, DecodeError, PipelineError
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.shard_decoder import ClipBatch, Following, ShardDecoder, ViewedClips, start_decoders
from pipeline.labelling.teacher_spec import TeacherSpec
from pipeline.logits.forms import mean_of_members
from pipeline.logits.part_ranges import join_ranges, publish_range
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import ClipFailure, part_stem, publish_part
from pipeline.models.device import Precision, choose_device, compute_in, device_name, tensor_dtype
from pipeline.models.transfer import DeviceCopies, HostCopy
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.watching import PATIENCE_SECONDS

BATCH_SIZES = {"cuda": 64, "cpu": 16}
"""Clips a forward pass, where nobody says how many."""


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
    """Clips a forward pass, which shows one view of them; 0 leaves it to the actors on Ray, whose device decides."""
    decode_workers: int = 0
    """Processes that decode; 0 is one for each core that torch uses."""
    patience: float = PATIENCE_SECONDS
    """How long a process may be waited for without a sign of life, in seconds."""
    device: str = "cpu"
    """Where the teachers run: cpu, cuda …"""
    compile: bool | None = None
    """Let `torch.compile` translate the teachers' blocks first; None leaves it to the actors on Ray, whose device and
    work decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """How one shard, or a stretch of one, went."""

    shard: str
    start: int
    stop: int
    """Which of the shard's clips, in the order of their bytes, were tried: those before `stop`."""
    published: bool
    """Whether that made the shard's part; else others make the rest."""
    clips: int
    """Clips tried."""
    failed: int
    """Of these, clips without logits."""
    seconds: float
    waiting_seconds: float = 0.0
    """Time in which the teachers had nothing to do because the next batch was not decoded yet."""
    copying_seconds: float = 0.0
    """Time in which they had nothing to do because the next batch was not on the device yet."""
    publishing_seconds: float = 0.0
    """Time that it took to write the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledRange:
    """A shard, or a stretch of one, whose logits are made, and perhaps still on their way from the device."""

    shard: str
    start: int
    stop: int
    """Which of the shard's clips, in the order of their bytes, were tried: those before `stop`."""
    is_whole: bool
    """Whether these are all of the shard's."""
    rows: list[int]
    """In the manifest, of the clips that have logits."""
    logits: list[HostCopy]
    """Of each batch of them, (teachers, batch, views, classes), float16."""
    failures: dict[int, ClipFailure]
    """Of the other clips, by row."""
    seconds: float
    """As in `ShardReport`, without publishing."""
    waiting_seconds: float
    copying_seconds: float


class ShardLabeller:
    """Teachers, loaded once, that label shard after shard.

    Args:
        config: see `LabellerConfig`.

    Raises:
        CheckpointError: a teacher can't be loaded, or its file here is not the one that the stamp names.
        LostProcessError: a process that decodes can't be started.
        ManifestError: the dataset has no usable manifest.
    """

    def __init__(self, config: LabellerConfig) -> None:
        if config.device == "cpu":
            keep_freed_memory()
        choose_device(config.device)  # says why, where it can't be used
        self._config = config
        self._manifest: Manifest = read_manifest(config.data)
        precision = cast("Precision", config.stamp.precision)
        self._on_gpu = config.device.startswith("cuda")
        self._device = device_name(config.device)
        with ExitStack() as ended_after_an_error:
            # They get ready while the teachers are loaded.
            pool = start_decoders(config.decode_workers or torch.get_num_threads(), config.patience)
            ended_after_an_error.callback(pool.close)
            self._ensemble = teacher.Ensemble(
                self._load_teachers(),
                [spec.weight for spec in config.teachers],
                tensor_dtype(precision),
                compiled=bool(config.compile),
            )
            ended_after_an_error.pop_all()
        compute_in(precision, self._ensemble.members)
        self._decoder = ShardDecoder(
            self._manifest,
            sample_rates_hz=self._ensemble.sample_rates_hz,
            seconds=self._ensemble.clip_seconds,
            views=config.stamp.views,
            batch_size=config.batch_size,
            processes=pool,
            patience=config.patience,
            pin_memory=self._on_gpu,
        )
        self._copies = DeviceCopies(config.device, timed=True)
        self._unfinished: deque[torch.cuda.Event] = deque()

    def _load_teachers(self) -> Iterator[nn.Module]:
        """Load one after the other, so that the ensemble has made one smaller before the next one comes."""
        for spec, stamped in zip(self._config.teachers, self._config.stamp.teachers, strict=True):
            loaded = spec.load(self._manifest, self._config.device)
            if loaded.sha256 != stamped.sha256:
                raise CheckpointError(
                    f"{loaded.source}: hashes to {loaded.sha256[:12]} on this machine, but to {stamped.sha256[:12]} "
                    "where the run was started. Give every machine the same file."
                )
            yield loaded.network

    def close(self) -> None:
        """End the processes that decode."""
        self._decoder.close()

    def label_shard(
        self,
        shard: str | ClipRange,
        on_progress: Callable[[int], None] = lambda clips: None,
        *,
        following: str | ClipRange | Following | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> ShardReport:
        """Make and publish the part of one shard: `compute` and `publish` in a row."""
        return self.publish(self.compute(shard, on_progress, following=following, enough=enough))

    def compute(
        self,
        shard: str | ClipRange,
        on_progress: Callable[[int], None] = lambda clips: None,
        *,
        following: str | ClipRange | Following | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> LabelledRange:
        """Make the logits of one shard, or of a stretch of it; a GPU may be at the last of them still.

        Args:
            shard: its name in the manifest, or the stretch, which begins where a batch does.
            on_progress: told how many of its clips are done, after each batch.
            following: what will be asked for next, if that is known, or who says so once this shard is about to end;
                its decoding begins meanwhile.
            enough: asked after each batch; the rest is left to others where it says so.

        Raises:
            LostProcessError: a process that decodes died or does not answer; the next shard gets others.
            PipelineError: the shard is not there. A bad clip raises nothing: it is listed in the part.
        """
        started, waiting = perf_counter(), 0.0
        wanted = self._decoder.range_of(shard)
        logits: list[HostCopy] = []
        labelled: list[int] = []
        failures: dict[int, ClipFailure] = {}
        batches = self._decoder.batches(wanted, following)
        count = 0
        while not (count and count % self._config.batch_size == 0 and enough()):
            asked = perf_counter()
            batch = next(batches, None)
            if self._is_idle():
                waiting += perf_counter() - asked
            if batch is None:
                break
            failures.update(batch.failures)
            try:
                if batch.rows:
                    logits.append(self._logits_of(batch))
                    labelled.extend(batch.rows)
            except DecodeError as error:
                [row] = batch.rows
                failures[row] = self._failure(row, error.reason, error.detail)
            count = len(labelled) + len(failures)
            on_progress(count)
        return LabelledRange(
            shard=wanted.shard,
            start=wanted.start,
            stop=wanted.start + count,
            is_whole=count == len(self._decoder.rows_of(wanted.shard)),
            rows=labelled,
            logits=logits,
            failures=failures,
            seconds=perf_counter() - started,
            waiting_seconds=waiting,
            copying_seconds=self._copies.take_stalled_seconds(),
        )

    def _is_idle(self) -> bool:
        """Whether the teachers have nothing left to do; a GPU works on while this process waits for the next batch."""
        return all(event.query() for event in self._unfinished)

    def _logits_of(self, batch: ClipBatch) -> HostCopy:
        """Returns each teacher's logits of each view: (teachers, batch, views, classes), float16.

        Where the members are not kept, their weighted mean stands for them, as a single teacher.

        Raises:
            DecodeError: the batch is one clip that is too long for the device's memory.
            PipelineError: the device's memory does not suffice even for a single clip of ordinary length.
        """
        logits = []
        for view in batch.views:
            try:
                members = self._ensemble(
                    self._on_device(view), view.edge_shifts_hz, view.lengths
                )  # (teachers, batch, classes)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                if len(batch.rows) == 1 and batch.seconds > ORDINARY_SECONDS:
                    raise DecodeError("too long for the memory", f"{batch.seconds:.0f} s ({reason})") from error
                raise PipelineError(
                    f"the memory of {self._config.device} does not suffice for these teachers and a single clip "
                    f"({reason}). Use a larger device, a lower --precision, fewer teachers, or --gpus-per-actor 1 "
                    "where actors share one."
                ) from error
            kept = members if self._config.stamp.members else self._ensemble.mean(members)[None]
            # An overflow becomes infinite here and is found before the part is published.
            logits.append(kept.to(torch.float16))
            self._keep_pace()
        return HostCopy(torch.stack(logits, dim=2))

    def _on_device(self, view: ViewedClips) -> dict[int, Tensor]:
        """Copy waveforms to the device; to a GPU while it still works at the views before."""
        copied = self._copies.copy(list(view.waveforms.values()))
        return dict(zip(view.waveforms, copied, strict=True))

    def _keep_pace(self) -> None:
        """Keep at most one batch queued on a GPU, so that the next one is copied meanwhile: memory is finite."""
        if not self._on_gpu:
            return
        done = torch.cuda.Event()
        done.record()
        self._unfinished.append(done)
        if len(self._unfinished) > 1:
            self._unfinished.popleft().synchronize()

    def publish(self, made: LabelledRange) -> ShardReport:
        """Publish the part of a shard, replacing an older one, or of a stretch of it; from any thread.

        Raises:
            PipelineError: the store can't be written.
        """
        started = perf_counter()
        stamp, shard, done = self._config.stamp, made.shard, slice(made.start, made.stop)
        teachers = len(stamp.teachers) if stamp.members else 1
        nothing = np.empty((teachers, 0, stamp.view_count, stamp.classes), np.float16)
        logits = np.concatenate([nothing, *(batch.read().numpy() for batch in made.logits)], axis=1)
        finite = np.isfinite(logits).all(axis=(0, 2, 3))  # (labelled clips,)
        labelled = np.array(made.rows, np.int64)
        bad = {row: self._failure(row, "non-finite logits") for row in labelled[~finite].tolist()}
        failures = made.failures | bad
        rows = logits[:, finite].reshape(teachers, -1, stamp.classes)  # (teachers, clips x views, classes)
        publish = publish_part if made.is_whole else partial(publish_range, start=made.start, stop=made.stop)
        publish(
            self._config.store,
            part_stem(shard),
            clip_ids=[self._clip_id(row) for row in labelled[finite].tolist()],
            logits=mean_of_members(rows, stamp.weights) if stamp.members else rows[0],
            stamp=stamp,
            shard_identity=self._manifest.shard_identity(shard),
            failures=[failures[row] for row in self._decoder.rows_of(shard)[done].tolist() if row in failures],
            members=rows if stamp.members else None,
            device=self._device if stamp.members else "",
        )
        publishing = perf_counter() - started
        return ShardReport(
            shard=shard,
            start=made.start,
            stop=made.stop,
            published=made.is_whole,
            clips=made.stop - made.start,
            failed=len(failures),
            seconds=made.seconds + publishing,
            waiting_seconds=made.waiting_seconds,
            copying_seconds=made.copying_seconds,
            publishing_seconds=publishing,
        )

    def join_shard(self, join: ShardJoin) -> ShardReport:
        """Publish the part of a shard whose clips were labelled in stretches; from any thread.

        Raises:
            PipelineError: a stretch is not there any more, or the store can't be written.
        """
        started = perf_counter()
        identity = self._manifest.shard_identity(join.shard)
        config = self._config
        failed = join_ranges(config.store, part_stem(join.shard), join.pieces, config.stamp, identity)
        clips, seconds = join.pieces[-1][1], perf_counter() - started
        return ShardReport(
            shard=join.shard,
            start=0,
            stop=clips,
            published=True,
            clips=clips,
            failed=failed,
            seconds=seconds,
            publishing_seconds=seconds,
        )

    def _failure(self, row: int, reason: str, detail: str = "") -> ClipFailure:
        return ClipFailure(clip_id=self._clip_id(row), reason=reason, detail=detail)

    def _clip_id(self, row: int) -> str:
        return self._manifest.clip_ids[row].as_py()
