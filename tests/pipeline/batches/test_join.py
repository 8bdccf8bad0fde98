from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches import join
from pipeline.batches.join import FailureTally, JoinedDataset, batch_loader, loader_processes
from pipeline.batches.sampling import EpochSampler, sampling_weights
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.decoding.pool import DecodingPool
from pipeline.errors import ShardError, TooManyFailuresError
from pipeline.logits.alignment import AlignedLogits, write_aligned


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Manifest:
    return read_manifest(make_dataset(tmp_path_factory.mktemp("data"), clips=24, broken=(5, 17)))


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> AlignedLogits:
    """Logits whose values tell their row; even rows have none."""
    rows = np.arange(1, 24, 2)
    values = np.repeat(rows[:, None], 4, axis=1).astype(np.float16)
    has_logits = np.arange(24) % 2 == 1
    return write_aligned(tmp_path_factory.mktemp("cache") / "l.npy", (24, 4), has_logits, 0, [(rows, values)])


@pytest.fixture(scope="module")
def dataset(manifest: Manifest, logits: AlignedLogits) -> JoinedDataset:
    return JoinedDataset(manifest, sample_rate_hz=8000, seconds=1.0, logits=logits)


def test_a_batch_holds_each_clip_s_sound_labels_and_logits(dataset: JoinedDataset) -> None:
    batch = dataset[np.array([7, 2])]
    assert batch.rows.tolist() == [7, 2]
    assert batch.waveforms.shape == (2, 8000)
    assert batch.labels.argmax(dim=1).tolist() == [3, 2]  # clip n belongs to class n modulo 4
    spectrum = torch.fft.rfft(batch.waveforms).abs()  # a bin a hertz
    assert spectrum.argmax(dim=1).tolist() == pytest.approx([3200, 1600], abs=2)
    assert (batch.waveforms[:, 4100:] == 0).all()  # half a second of sound, the rest padded
    assert batch.has_teacher.tolist() == [True, False]
    assert batch.teacher_logits.tolist() == [[7.0] * 4, [0.0] * 4]
    assert batch.valid.all()


def test_a_clip_that_cannot_be_decoded_is_marked_with_its_reason(dataset: JoinedDataset) -> None:
    batch = dataset[np.array([4, 5, 6])]
    assert batch.valid.tolist() == [True, False, True]
    assert [failure.row for failure in batch.failures] == [5]
    assert batch.failures[0].reason
    assert batch.waveforms.any(dim=1).tolist() == [True, False, True]
    kept = batch.only_valid()
    assert kept.rows.tolist() == [4, 6]
    assert len(kept.waveforms) == len(kept.labels) == len(kept.has_teacher) == 2


def test_a_shard_that_changed_under_the_manifest_fails_its_clips_only(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path, clips=24)
    (folder / "train-000001.tar").unlink()
    batch = JoinedDataset(read_manifest(folder), sample_rate_hz=8000, seconds=1.0)[np.array([9, 10, 20])]
    assert batch.valid.tolist() == [True, False, True]
    assert batch.failures[0].reason == "shard unreadable"


def test_without_a_store_no_clip_has_a_teacher(manifest: Manifest) -> None:
    batch = JoinedDataset(manifest, sample_rate_hz=8000, seconds=1.0)[np.array([1, 3])]
    assert not batch.has_teacher.any()
    assert batch.teacher_logits.shape == (2, 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(dataset: JoinedDataset, workers: int) -> None:
    sampler = EpochSampler(weights=sampling_weights(dataset.manifest), batch_size=5, seed=3)
    alone = list(batch_loader(dataset, sampler.batches(2, 9), workers=0))
    together = list(batch_loader(dataset, sampler.batches(2, 9), workers=workers))
    assert len(alone) == len(together) == 7
    for ours, theirs in zip(together, alone, strict=True):
        for name in ("rows", "waveforms", "labels", "teacher_logits", "has_teacher", "valid"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.failures == theirs.failures


def test_an_endless_plan_can_be_left_at_any_time(dataset: JoinedDataset) -> None:
    sampler = EpochSampler(weights=np.ones(24), batch_size=5, seed=3)
    loader = batch_loader(dataset, sampler.batches(), workers=1)
    assert len(list(islice(loader, 12))) == 12


def test_rare_classes_are_drawn_more_often(manifest: Manifest) -> None:
    weights = sampling_weights(manifest)
    np.testing.assert_allclose(weights, 1000 / (100 + 6))  # 24 clips, 4 classes, a class each


def test_failures_count_once_a_clip_and_survive_a_checkpoint(manifest: Manifest, dataset: JoinedDataset) -> None:
    tally = FailureTally(manifest, max_share=0.5)
    for _ in range(3):
        batch = dataset[np.array([4, 5, 6, 7])]
        tally.count(batch.rows.numpy(), batch.failures)
    assert [clip_id for clip_id, *_ in tally.failures] == ["clip5"]
    assert tally.summary().startswith("1 of 4 clips can't be used (25.0 %): 1 ")
    tally.check()
    strict = FailureTally(manifest, max_share=0.2)
    strict.load_state_dict(tally.state_dict())
    assert strict.failures == tally.failures
    with pytest.raises(TooManyFailuresError, match=r"1 of 4 .* the limit is 20 %. The first is clip5"):
        strict.check()


def test_clips_of_a_batch_are_read_in_the_order_in_which_they_lie(dataset: JoinedDataset) -> None:
    asked: list[int] = []

    def read(row: int) -> bytes:
        asked.append(row)
        raise ShardError("not now")

    dataset.reader.join(np.array([20, 3, 11, 0]), read)
    assert asked == [0, 3, 11, 20]


def test_clips_of_own_lengths_stand_one_behind_the_other_and_are_padded_as_rows(manifest: Manifest) -> None:
    dataset = JoinedDataset(manifest, sample_rate_hz=8000, seconds=float("inf"), own_lengths=True)
    fixed = JoinedDataset(manifest, sample_rate_hz=8000, seconds=0.5)
    rows = np.array([4, 5, 6])  # 5 can't be decoded
    batch, padded = dataset[rows], fixed[rows].waveforms
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [4000, 1, 4000]
    assert batch.waveforms.shape == (8001,)
    assert torch.equal(batch.padded(), padded)
    for some in (batch.only_valid(), batch.only(slice(0, 3, 2)), batch.only(torch.tensor([True, False, True]))):
        assert torch.equal(some.padded(), padded[::2])
        assert some.lengths is not None
        assert some.lengths.tolist() == [4000, 4000]


def test_a_long_clip_makes_no_tensor_of_a_whole_batch_of_its_length(manifest: Manifest) -> None:
    batch = JoinedDataset(manifest, sample_rate_hz=8000, seconds=1.0)[np.arange(6)]
    lengths = torch.tensor([10, 10, 3600, 10, 10, 10]) * 8
    batch = replace(batch, waveforms=torch.arange(float(lengths.sum())), lengths=lengths)
    parts = list(batch.divided(8))
    assert [part.rows.tolist() for part in parts] == [[0, 1], [2], [3, 4, 5]]
    assert max(part.waveforms.numel() for part in parts) == 3600 * 8
    ends = {
        row: part.waveforms[place, lengths[row] - 1] for part in parts for place, row in enumerate(part.rows.tolist())
    }
    assert [ends[row] for row in range(6)] == (lengths.cumsum(0) - 1).tolist()


@pytest.mark.parametrize(
    ("workers", "device", "ranks", "expected"),
    [
        (None, "cuda", 1, 16),
        (None, "cuda", 4, 4),
        (None, "cpu", 1, 4),
        (None, None, 8, 2),
        (3, "cuda", 1, 3),
        (0, "cuda", 1, 0),
        (99, "cpu", 1, 16),
    ],
)
def test_a_gpu_is_fed_by_all_cores_of_its_rank_and_a_cpu_keeps_some(
    workers: int | None, device: str | None, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert loader_processes(workers, None if device is None else torch.device(device)) == expected


def test_a_pool_begins_with_the_first_batches_before_anybody_asks_for_them(dataset: JoinedDataset) -> None:
    begun: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(6):
            begun.append(number)
            yield np.arange(4 * number, 4 * number + 4)

    with DecodingPool(1) as pool:
        loaded = batch_loader(dataset, batches(), workers=pool)
        assert begun == [0, 1], "as many as the pool has on their way"
        assert [batch.rows.tolist() for batch in loaded] == [list(range(row, row + 4)) for row in range(0, 24, 4)]
