"""Shards on an object store: fetched in long ranges, ahead, and decoded to the same batches as from a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from object_servers import Proxy

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import PipelineError
from pipeline.labelling import shard_fetching
from pipeline.labelling.clip_range import ClipRange
from pipeline.labelling.shard_decoder import ClipBatch, ShardDecoder
from pipeline.storage import files as storage

FIRST, SECOND = "tiny-000000.tar", "tiny-000001.tar"


@pytest.fixture
def manifest(build_dataset: Callable, make_noises: Callable) -> Manifest:
    """Two shards of twelve, on the disk."""
    return build_dataset("data", make_noises(24, 5), clips_per_shard=12)


def copied(manifest: Manifest, folder: str) -> Manifest:
    for path in Path(manifest.location).iterdir():
        storage.publish_bytes(f"{folder}/{path.name}", path.read_bytes())
    return read_manifest(folder)


def batches_of(manifest: Manifest, *asked: str | ClipRange) -> list[list[ClipBatch]]:
    """Returns the batches of shards that are asked for one after the other, each announced before."""
    decoder = ShardDecoder(manifest, sample_rates_hz=(16_000,), seconds=0.1, batch_size=2, processes=2)
    try:
        return [list(decoder.batches(one, following)) for one, following in zip(asked, [*asked[1:], None], strict=True)]
    finally:
        decoder.close()


def test_batches_from_a_server_are_those_from_a_disk_with_few_requests_two_at_a_time(
    manifest: Manifest, s3_proxy: Proxy, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = copied(manifest, s3_folder)
    monkeypatch.setattr(shard_fetching, "STRETCH_BYTES", 62_000)  # two batches, with what tars have between clips
    s3_proxy.reset()
    s3_proxy.latency_seconds = 0.05
    asked = (FIRST, ClipRange(SECOND, 2, 8))
    found, expected = batches_of(remote, *asked), batches_of(manifest, *asked)
    requests = [path for _, path in s3_proxy.requests]
    assert (sum(FIRST in path for path in requests), sum(SECOND in path for path in requests)) == (3, 2)
    assert s3_proxy.most_at_once == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [batch.rows for batch in ours] == [batch.rows for batch in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.views[0].waveforms[16_000], other.views[0].waveforms[16_000])


def test_clips_that_lie_far_apart_are_read_by_themselves(
    manifest: Manifest, s3_proxy: Proxy, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = manifest.table.take([0, 11])
    remote = copied(manifest, s3_folder)
    monkeypatch.setattr(shard_fetching, "STRETCH_BYTES", 0)
    sparse = Manifest(location=remote.location, table=few, vocabulary=remote.vocabulary)
    s3_proxy.reset()
    [[batch]] = batches_of(sparse, FIRST)
    assert (batch.rows, batch.failures) == ([0, 1], {})
    assert len(s3_proxy.requests) == 2


def test_what_is_wrong_with_a_shard_on_a_server_is_told_when_its_turn_comes(manifest: Manifest, s3_folder: str) -> None:
    remote = copied(manifest, s3_folder)
    storage.remove(f"{s3_folder}/{SECOND}")
    decoder = ShardDecoder(remote, sample_rates_hz=(16_000,), seconds=0.1, batch_size=2, processes=1)
    assert len(list(decoder.batches(FIRST, following=SECOND))) == 6
    with pytest.raises(PipelineError, match=f"{SECOND}: no such file"):
        list(decoder.batches(SECOND))
    decoder.close()


def test_clips_behind_the_end_of_a_cut_tar_fail_alone(manifest: Manifest, s3_folder: str) -> None:
    remote = copied(manifest, s3_folder)
    whole = storage.read_bytes(f"{s3_folder}/{FIRST}")
    storage.publish_bytes(f"{s3_folder}/{FIRST}", whole[: int(remote.offsets[9]) + 100])
    [batches] = batches_of(remote, FIRST)
    assert [row for batch in batches for row in batch.rows] == list(range(9))
    failures = {row: failure.reason for batch in batches for row, failure in batch.failures.items()}
    assert failures == dict.fromkeys([9, 10, 11], "shard unreadable")
