"""Whole shards, read from their start to their end → batches, for stores where every seek is dear.

Which clips come, and in which batch, `StreamSampler` has decided before anything is read. What is here only fetches
them in the order in which they lie, and keeps each until its batch is due.
"""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.batches.join import JoinedDataset, TrainingBatch, ViewedRows, batch_loader, loader_processes
from pipeline.batches.sampling import EpochSampler, StreamSampler
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import AUDIO_FORMATS, check_clip_bytes
from pipeline.errors import PipelineError, ShardError, StorageUnavailableError
from pipeline.ingest.descriptions import clip_id_of, parse_description
from pipeline.ingest.rejections import UnusableClipError
from pipeline.storage import files as storage

_REQUEST_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamRequest:
    """What a loader worker is asked for: one process's part of one step."""

    reader: int
    """Which of the process's readers it comes from."""
    rows: np.ndarray
    """(batch,), int64: rows in the manifest."""
    coming: np.ndarray | None = None
    """(clips,), int64, with a reader's first request in an epoch: all that it will be asked for in that epoch, in the
    order in which they lie."""
    wanted: np.ndarray | ViewedRows | None = None
    """The same rows, with the view that each clip is shown in where it has several; None is the clips as they are."""


def load_steps(
    dataset: JoinedDataset,
    sampler: EpochSampler,
    *,
    first_step: int = 0,
    end_step: int | None = None,
    positions: slice = slice(None),
    workers: int,
    pin_memory: bool = False,
) -> Iterable[TrainingBatch]:
    """Load one rank's part of each step's batch, in the way that the sampler wants the shards read.

    Args:
        dataset: the clips.
        sampler: which clips each step takes.
        first_step: where to begin.
        end_step: where to end, this one not included; None goes on for ever.
        positions: this rank's in a global batch.
        workers: see `batch_loader`.
        pin_memory: see `batch_loader`.
    """
    if not isinstance(sampler, StreamSampler):
        rows = (batch[positions] for batch in sampler.batches(first_step, end_step))
        wanted = dataset.requests(rows, seed=sampler.seed, first_step=first_step)
        return batch_loader(dataset, wanted, workers=workers, pin_memory=pin_memory)
    in_turn = stream_requests(sampler, positions=positions, first_step=first_step, end_step=end_step)
    requests = (
        replace(request, wanted=dataset.request(request.rows, seed=sampler.seed, step=step))
        for step, request in enumerate(in_turn, start=first_step)
    )
    workers = stream_workers(sampler.stream.readers, loader_processes(workers))
    return batch_loader(StreamedClips(dataset), requests, workers=workers, pin_memory=pin_memory)


def stream_requests(
    sampler: StreamSampler, *, positions: slice = slice(None), first_step: int = 0, end_step: int | None = None
) -> Iterator[StreamRequest]:
    """Go through the steps from `first_step` up to but without `end_step` (None: for ever), for one process.

    A run that goes on within an epoch asks for the very batches that it would have had: clips of earlier steps are
    passed over, and shards that hold nothing else are not opened.
    """
    step = first_step
    while end_step is None or step < end_step:
        epoch = sampler.epoch_of(step)
        last = (epoch + 1) * sampler.steps_per_epoch
        batches = sampler.order(epoch).reshape(-1, sampler.batch_size)[step - last :, positions]  # (steps left, batch)
        readers = sampler.reader_of(np.arange(step, last))  # (steps left,)
        visits, started = sampler.visits(epoch), set[int]()
        for rows, reader in zip(batches, readers.tolist(), strict=True):
            if step == end_step:
                return
            coming = None
            if reader not in started:
                started.add(reader)
                coming = batches[readers == reader].reshape(-1)
                coming = coming[np.argsort(visits[coming])]
            yield StreamRequest(reader=reader, rows=rows, coming=coming)
            step += 1


def stream_workers(readers: int, workers: int) -> int:
    """Returns the largest number of loader processes up to `workers` that share `readers` evenly; 0 stays 0.

    Loaders ask their workers in turn, so with such a number each reader's requests all reach the same worker.
    """
    return max(number for number in range(workers + 1) if number == 0 or readers % number == 0)


class StreamedClips(Dataset[TrainingBatch]):
    """A dataset's clips joined with their teacher logits; an item is a process's part of a step.

    Args:
        clips: the dataset; what it holds of a clip does not depend on how its bytes were read.
    """

    def __init__(self, clips: JoinedDataset) -> None:
        self._clips = clips
        self._readers: dict[int, _Reader] = {}

    def __getitem__(self, request: StreamRequest) -> TrainingBatch:
        """Read on until all clips of a request are there."""
        if request.coming is not None:
            self._readers[request.reader] = _Reader(self._clips.manifest, request.coming)
        found = self._readers[request.reader].take(request.rows)

        def read(row: int) -> bytes:
            audio = found.pop(row)
            if isinstance(audio, PipelineError):
                raise audio
            return audio

        return self._clips.batch(request.rows if request.wanted is None else request.wanted, read)


class _Reader:
    """Reads one clip after the other and keeps those that are not due yet."""

    def __init__(self, manifest: Manifest, coming: np.ndarray) -> None:
        self._source = _read_in_turn(manifest, coming)
        self._held: dict[int, bytes | PipelineError] = {}

    def take(self, rows: np.ndarray) -> dict[int, bytes | PipelineError]:
        missing = set(rows.tolist()) - self._held.keys()
        while missing:
            row, found = next(self._source)
            self._held[row] = found
            missing.discard(row)
        return {row: self._held.pop(row) for row in rows.tolist()}


def _read_in_turn(manifest: Manifest, rows: np.ndarray) -> Iterator[tuple[int, bytes | PipelineError]]:
    for shard, of_shard in groupby(rows.tolist(), key=manifest.shard_of_clip.__getitem__):
        yield from stream_shard(manifest, manifest.shards[shard], list(of_shard))


def stream_shard(manifest: Manifest, shard: str, rows: list[int]) -> Iterator[tuple[int, bytes | PipelineError]]:
    """Read a shard up to the last of some clips: each row with its encoded audio, or with the reason why not.

    Args:
        manifest: the dataset.
        shard: the tar's name in it.
        rows: rows of that shard.
    """
    ids = manifest.clip_ids.take(pa.array(rows)).to_pylist()
    wanted: dict[str, int] = dict(zip(ids, rows, strict=True))
    reason = "the clip is not there"
    unavailable: StorageUnavailableError | None = None
    try:
        for clip_id, audio in _clips_of(storage.join_path(manifest.location, shard)):
            row = wanted.pop(clip_id, None)
            if row is not None:
                yield row, _checked(manifest, row, audio)
            if not wanted:
                return
    except StorageUnavailableError as error:
        unavailable = error  # no fault of the clips'
    except (PipelineError, OSError, EOFError, tarfile.TarError) as error:
        reason = str(error)
    for row in wanted.values():
        yield (
            row,
            unavailable
            or ShardError(f"{manifest.location}: can't read clip {manifest.clip_ids[row]} from {shard} ({reason})"),
        )


def _checked(manifest: Manifest, row: int, audio: bytes) -> bytes | PipelineError:
    try:
        check_clip_bytes(manifest, row, audio)
    except ShardError as error:
        return error
    return audio


def _clips_of(location: str) -> Iterator[tuple[str, bytes]]:
    """Yields the id and the encoded audio of each clip of a tar.

    They are those of its index where the members of each clip lie side by side, as WebDataset wants them.
    """
    faults: list[Exception] = []
    with storage.open_input(location, request_bytes=_REQUEST_BYTES) as stream:
        members = _up_to_a_fault(
            tar_file_expander([{"url": location, "stream": stream}], select_files=_is_ours), faults
        )
        for sample in group_by_keys(members, keys=_split_name, handler=_keep_the_first):
            audio = next((value for extension, value in sample.items() if extension in AUDIO_FORMATS), None)
            if audio is None:
                continue
            try:
                description = parse_description(sample["json"]) if "json" in sample else {}
                yield clip_id_of(description, sample["__key__"]), audio
            except UnusableClipError:
                continue  # the index has rejected it
    if faults:
        raise faults[0]


def _up_to_a_fault(members: Iterable[Any], faults: list[Exception]) -> Iterator[Any]:
    """End at a fault instead of raising it, so that the clip before it, whose members are complete, is still given."""
    try:
        yield from members
    except (PipelineError, OSError, EOFError, tarfile.TarError) as error:
        faults.append(error)


def _split_name(name: str) -> tuple[str, str]:
    key, _, extension = name.removeprefix("./").rpartition(".")
    return key, extension.lower()


def _is_ours(name: str) -> bool:
    key, extension = _split_name(name)
    return bool(key) and (extension == "json" or extension in AUDIO_FORMATS)


def _keep_the_first(error: Exception) -> bool:
    # Of two members with one name the index has taken the first; any other error ends the shard.
    if isinstance(error, ValueError):
        return True
    raise error
