"""The steps of a plan → batches, in the way in which the plan wants the shards read: clip by clip, or whole shards.

For stores where every seek is dear, `StreamSampler` decides which clips come, and in which batch, before anything is
read. What reads only fetches them in the order in which they lie, and keeps each until its batch is due.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.batches.join import JoinedDataset, TrainingBatch, batch_loader, load_batches, load_in_pool
from pipeline.batches.sampling import EpochSampler, StreamSampler
from pipeline.batches.shard_streams import StreamReader, StreamRequest
from pipeline.decoding.pool import DecodingPool


def load_steps(
    dataset: JoinedDataset,
    sampler: EpochSampler,
    *,
    first_step: int = 0,
    end_step: int | None = None,
    positions: slice = slice(None),
    workers: int | DecodingPool | None,
    device: torch.device | None = None,
) -> Iterator[TrainingBatch]:
    """Load one rank's part of each step's batch, in the way that the sampler wants the shards read.

    Args:
        dataset: the clips.
        sampler: which clips each step takes.
        first_step: where to begin.
        end_step: where to end, this one not included; None goes on for ever.
        positions: this rank's in a global batch.
        workers: see `batch_loader`.
        device: see `batch_loader`.

    Raises:
        LostProcessError: a decoding process died or does not answer.
    """
    if not isinstance(sampler, StreamSampler):
        rows = (batch[positions] for batch in sampler.batches(first_step, end_step))
        wanted = dataset.requests(rows, seed=sampler.seed, first_step=first_step)
        return batch_loader(dataset, wanted, workers=workers, device=device)
    in_turn = stream_requests(sampler, positions=positions, first_step=first_step, end_step=end_step)
    requests = (
        replace(request, wanted=dataset.request(request.rows, seed=sampler.seed, step=step))
        for step, request in enumerate(in_turn, start=first_step)
    )
    readers, reader = sampler.stream.readers, StreamReader(dataset.reader)

    def load(pool: DecodingPool) -> Iterator[TrainingBatch]:
        return load_batches(reader, requests, pool=pool, processes=stream_workers(readers, pool.size), device=device)

    return load_in_pool(workers, device, load)


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
    """Returns the largest number of decoding processes up to `workers` that share `readers` evenly; 0 stays 0.

    A pool asks its processes in turn, so with such a number each reader's requests all reach the same process.
    """
    return max(number for number in range(workers + 1) if number == 0 or readers % number == 0)
