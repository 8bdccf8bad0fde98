"""A dataset's shards → parts of a store of embeddings, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.join import JoinedDataset, batch_loader, check_reachable, loader_processes, scoring_batch
from pipeline.dataset.manifest import Manifest
from pipeline.decoding.pool import DecodingPool
from pipeline.embeddings.layers import Embedder
from pipeline.embeddings.store import EmbeddingStamp, publish_part
from pipeline.logits.store import ClipFailure
from pipeline.models.device import Precision
from pipeline.models.hearing import AudioModel, model_input


def embed_shards(
    embedder: Embedder,
    manifest: Manifest,
    shards: Sequence[str],
    out: str,
    stamp: EmbeddingStamp,
    *,
    batch_size: int | None,
    workers: int | None,
    device: torch.device,
    precision: Precision,
    on_clips: Callable[[int], None] = lambda clips: None,
) -> None:
    """Embed the clips of some shards, and publish each shard's part as soon as it is whole.

    Args:
        embedder: on `device`.
        manifest: the dataset.
        shards: their names.
        out: the store.
        stamp: of the store.
        batch_size: clips a forward pass, see `scoring_batch`; batches don't cross shards.
        workers: processes that decode, see `loader_processes`; 0 decodes in this one.
        device: where the model is.
        precision: of the network.
        on_clips: told how many more clips are done.
    """
    dataset = JoinedDataset(manifest, **asdict(model_input(cast("AudioModel", embedder.network))))
    size = scoring_batch(batch_size, device)
    with DecodingPool(loader_processes(workers, device)) as pool:
        for shard in shards:
            rows = manifest.rows_of_shard(shard)
            found: dict[int, np.ndarray] = {}
            failures: dict[int, ClipFailure] = {}
            for some, vectors, broken in _batches(embedder, dataset, rows, pool, size, device, precision):
                found |= zip(some, vectors, strict=True)
                failures |= broken
                on_clips(len(some) + len(broken))
            kept = [row for row in rows.tolist() if row in found]
            publish_part(
                out,
                shard,
                [manifest.clip_id(row) for row in kept],
                np.stack([found[row] for row in kept]) if kept else np.empty((0, stamp.size), np.float16),
                stamp,
                manifest.shard_identity(shard),
                [failures[row] for row in rows.tolist() if row in failures],
            )


def _batches(
    embedder: Embedder,
    dataset: JoinedDataset,
    rows: np.ndarray,
    pool: DecodingPool,
    batch_size: int,
    device: torch.device,
    precision: Precision,
):
    """Yields rows, their vectors and what could not be embedded."""
    manifest = dataset.manifest
    batches = np.split(rows, np.arange(batch_size, len(rows), batch_size))
    for batch in batch_loader(dataset, batches, workers=pool, device=device):
        check_reachable(batch.failures)
        broken = {
            one.row: ClipFailure(clip_id=manifest.clip_id(one.row), reason=one.reason, detail=one.detail)
            for one in batch.failures
        }
        good: list[int] = []
        vectors: list[np.ndarray] = []
        for part in batch.divided(embedder.sample_rate_hz):
            if not part.valid.any():
                continue
            waveforms: Tensor = part.waveforms[part.valid].to(device, non_blocking=True)
            lengths = None if part.lengths is None else part.lengths[part.valid]
            made = embedder(waveforms, lengths, precision).cpu().numpy().astype(np.float16)  # (clips, size)
            for row, vector in zip(part.rows[part.valid].tolist(), made, strict=True):
                if np.isfinite(vector).all():
                    good.append(row)
                    vectors.append(vector)
                else:
                    broken[row] = ClipFailure(clip_id=manifest.clip_id(row), reason="non-finite embedding", detail="")
        yield good, vectors, broken
