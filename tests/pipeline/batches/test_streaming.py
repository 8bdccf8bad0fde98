import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.batches.join import JoinedDataset, TrainingBatch
from pipeline.batches.sampling import EpochSampler, StreamConfig, StreamSampler, build_sampler
from pipeline.batches.shard_streams import stream_shard
from pipeline.batches.streaming import load_steps, stream_workers
from pipeline.dataset.clip_table import ClipTable
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.ingest.tars import TarRules, index_tars
from pipeline.logits.alignment import AlignedLogits, write_aligned
from pipeline.storage.files import RangeReader


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Manifest:
    """34 clips in shards of 10, 10, 10 and 4; clip 5 holds no sound."""
    return read_manifest(make_dataset(tmp_path_factory.mktemp("data"), clips=34, broken=(5,)))


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> AlignedLogits:
    values = np.repeat(np.arange(34)[:, None], 4, axis=1).astype(np.float16)
    path = tmp_path_factory.mktemp("cache") / "l.npy"
    return write_aligned(path, (34, 4), np.ones(34, bool), 0, [(np.arange(34), values)])


@pytest.fixture(scope="module")
def dataset(manifest: Manifest, logits: AlignedLogits) -> JoinedDataset:
    return JoinedDataset(manifest, sample_rate_hz=8000, seconds=0.5, logits=logits)


def sampler_of(manifest: Manifest, *, ranks: int = 1, readers: int = 4, **settings: float) -> StreamSampler:
    stream = StreamConfig(shuffle=8, readers=readers, **settings)  # pyright: ignore[reportArgumentType]
    sampler = build_sampler(
        manifest, sampling="stream", batch_size=6, clips_per_epoch=24, seed=1, stream=stream, ranks=ranks
    )
    assert isinstance(sampler, StreamSampler)
    return sampler


def assert_same(ours: TrainingBatch, theirs: TrainingBatch) -> None:
    for name in ("rows", "waveforms", "labels", "teacher_logits", "has_teacher", "valid"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.failures == theirs.failures


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_hold_what_reading_each_clip_alone_gives(dataset: JoinedDataset, workers: int) -> None:
    sampler = sampler_of(dataset.manifest)
    streamed = list(load_steps(dataset, sampler, end_step=10, workers=workers))
    assert [batch.rows.tolist() for batch in streamed] == [rows.tolist() for rows in sampler.batches(0, 10)]
    for batch in streamed:
        assert_same(batch, dataset[batch.rows.numpy()])
    assert any(batch.failures for batch in streamed)  # clip 5 holds no sound
    assert all(torch.equal(batch.teacher_logits[:, 0], batch.rows.float()) for batch in streamed)


@pytest.mark.parametrize("first_step", [1, 4, 6, 7])
def test_a_run_that_goes_on_gets_the_very_batches_it_would_have_had(dataset: JoinedDataset, first_step: int) -> None:
    sampler = sampler_of(dataset.manifest, readers=2)
    whole = list(load_steps(dataset, sampler, end_step=9, workers=0))
    rest = list(load_steps(dataset, sampler, first_step=first_step, end_step=9, workers=0))
    assert len(rest) == 9 - first_step
    for ours, theirs in zip(rest, whole[first_step:], strict=True):
        assert_same(ours, theirs)


def test_ranks_and_readers_beyond_the_number_of_shards_share_each_batch(dataset: JoinedDataset) -> None:
    sampler = sampler_of(dataset.manifest, ranks=3, readers=4)  # 12 readers, 4 shards
    shares = [
        list(load_steps(dataset, sampler, end_step=8, positions=sampler.positions_of(rank), workers=2))
        for rank in range(3)
    ]
    for step, rows in enumerate(sampler.batches(0, 8)):
        parts = [shares[rank][step].rows for rank in range(3)]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert torch.cat(parts).tolist() == rows.tolist()


def test_a_reader_opens_no_shard_twice_nor_one_whose_clips_are_done(
    dataset: JoinedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def watched(clips: ClipTable, shard: str, rows: list[int]) -> Iterator[object]:
        opened.append(shard)
        return stream_shard(clips, shard, rows)

    monkeypatch.setattr("pipeline.batches.shard_streams.stream_shard", watched)
    sampler = sampler_of(dataset.manifest, readers=1)
    list(load_steps(dataset, sampler, end_step=4, workers=0))
    assert len(opened) == len(set(opened)) == 4
    whole, opened[:] = list(opened), []
    list(load_steps(dataset, sampler, first_step=3, end_step=4, workers=0))
    assert opened == whole[-len(opened) :]
    assert len(opened) < 4


def test_workers_divide_the_readers_evenly() -> None:
    assert [stream_workers(4, workers) for workers in range(6)] == [0, 1, 2, 2, 4, 4]
    assert stream_workers(5, 4) == 1


def with_checksums(manifest: Manifest) -> Manifest:
    reader = RangeReader(manifest.location)
    checksums = [zlib.crc32(read_clip_bytes(reader, manifest, row)) for row in range(len(manifest))]
    column = manifest.table.schema.get_field_index("crc32")
    table = manifest.table.set_column(column, "crc32", pa.array(checksums, pa.uint32()))
    return Manifest(manifest.location, table, manifest.vocabulary)


def test_shards_that_are_gone_damaged_or_changed_fail_their_clips_only(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path, clips=40)
    manifest = with_checksums(read_manifest(folder))
    (folder / "train-000000.tar").unlink()
    content = bytearray((folder / "train-000001.tar").read_bytes())
    content[manifest.offsets[13] + 50] ^= 1  # one bit of clip 13
    (folder / "train-000001.tar").write_bytes(content)
    whole = (folder / "train-000002.tar").read_bytes()
    (folder / "train-000002.tar").write_bytes(whole[: manifest.offsets[25] + 100])  # ends within clip 25
    sampler = build_sampler(manifest, sampling="stream", batch_size=8, stream=StreamConfig(readers=2))
    found = list(load_steps(JoinedDataset(manifest, sample_rate_hz=8000, seconds=0.5), sampler, end_step=5, workers=0))
    failed = {failure.row: failure.reason for batch in found for failure in batch.failures}
    assert set(failed) == {*range(10), 13, *range(25, 30)}
    assert set(failed.values()) == {"shard unreadable"}
    assert sum(int(batch.valid.sum()) for batch in found) == 24


def foreign_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_clips_of_others_tars_are_found_by_their_id_not_their_name(tmp_path: Path, manifest: Manifest) -> None:
    described = {number: json.dumps({"id": f"id.{number}", "label_id": [number]}).encode() for number in range(3)}
    members: dict[str, bytes] = {"readme.txt": b"hello"}
    for number in range(3):
        members |= {f"./some.{number}.wav": b"sound %d" % number, f"./some.{number}.json": described[number]}
        members |= {f"./some.{number}.npy": b"an embedding"}
    foreign_tar(tmp_path / "x.tar", members.items())
    ledger = index_tars(str(tmp_path), ["x.tar"], TarRules(vocabulary=manifest.vocabulary))
    foreign = Manifest(str(tmp_path), ledger.rows, manifest.vocabulary)
    assert foreign.clip_ids.to_pylist() == ["id.0", "id.1", "id.2"]
    assert list(stream_shard(foreign.clips, "x.tar", [0, 2])) == [(0, b"sound 0"), (2, b"sound 2")]


def test_shards_behind_a_url_are_streamed(dataset: JoinedDataset) -> None:
    filesystem = fsspec.filesystem("memory")
    for path in Path(dataset.manifest.location).iterdir():
        filesystem.pipe_file(f"/streamed/{path.name}", path.read_bytes())
    remote = JoinedDataset(read_manifest("memory://streamed"), sample_rate_hz=8000, seconds=0.5)
    found = list(load_steps(remote, sampler_of(remote.manifest), end_step=4, workers=0))
    assert len(found) == 4
    for batch in found:
        local = dataset[batch.rows.numpy()]
        assert_same(batch, replace(local, teacher_logits=batch.teacher_logits, has_teacher=batch.has_teacher))


def test_other_plans_read_each_clip_alone(dataset: JoinedDataset) -> None:
    sampler = EpochSampler(weights=np.ones(34), batch_size=6, seed=1)
    found = list(load_steps(dataset, sampler, first_step=2, end_step=7, positions=slice(2, 5), workers=0))
    assert [batch.rows.tolist() for batch in found] == [rows[2:5].tolist() for rows in sampler.batches(2, 7)]


def test_a_member_that_stands_twice_in_a_shard_means_its_first(tmp_path: Path, manifest: Manifest) -> None:
    members = [("a.wav", b"first"), ("a.json", b'{"labels": [0]}'), ("a.wav", b"again"), ("a.flac", b"other")]
    foreign_tar(tmp_path / "x.tar", [*members, ("b.wav", b"later"), ("b.json", b'{"labels": [0]}')])
    ledger = index_tars(str(tmp_path), ["x.tar"], TarRules(vocabulary=manifest.vocabulary))
    twice = Manifest(str(tmp_path), ledger.rows, manifest.vocabulary)
    assert list(stream_shard(twice.clips, "x.tar", [0, 1])) == [(0, b"first"), (1, b"later")]
