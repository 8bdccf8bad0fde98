"""What the student is shown of a view is what its teachers saw: the same samples, the same bands, their own logits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_stores import stamp_for
from safetensors.torch import load_file

from pipeline.batches.join import JoinedDataset, batch_loader
from pipeline.batches.reading import ViewedRows, kept_seconds
from pipeline.batches.sampling import StreamConfig, build_sampler
from pipeline.batches.streaming import load_steps
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.labelling.shard_decoder import ShardDecoder
from pipeline.logits.store import LogitStore, open_store, publish_part, write_stamp
from pipeline.storage.cache import CacheFolder

pytestmark = pytest.mark.usefixtures("one_thread")

RATE_HZ, SECONDS, VIEWS = 32_000, 0.3, 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Manifest:
    """Half-second clips: longer than what is listened to, so that earlier views end in sound that others don't hear."""
    return read_manifest(make_dataset(tmp_path_factory.mktemp("data"), clips=8, broken=(5,)))


@pytest.fixture(scope="module")
def views() -> ViewsStamp:
    return ViewsStamp(count=VIEWS, config=ViewConfig(seed=2))


@pytest.fixture(scope="module")
def store(manifest: Manifest, views: ViewsStamp, tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    """Logits that tell clip and view: 10 * row + view."""
    return make_store(tmp_path_factory.mktemp("store"), manifest, views)


def make_store(folder: Path, manifest: Manifest, views: ViewsStamp | None) -> LogitStore:
    stamp = replace(stamp_for(manifest), views=views)
    logits = (10 * np.arange(8)[:, None] + np.arange(stamp.view_count)).reshape(-1, 1).repeat(4, axis=1)
    write_stamp(str(folder), stamp)
    publish_part(str(folder), "train-000000", manifest.clip_ids.to_pylist(), logits, stamp, "")
    return open_store(str(folder))


def joined(manifest: Manifest, store: LogitStore, cache_dir: Path, **settings: object) -> JoinedDataset:
    logits = store.align(manifest, cache_dir, all_views=True)
    given = {"sample_rate_hz": RATE_HZ, "seconds": SECONDS, "logits": logits, "views": store.stamp.views, **settings}
    return JoinedDataset(manifest, **given)  # pyright: ignore[reportArgumentType]


def test_student_sees_what_the_teacher_saw_sample_for_sample(
    manifest: Manifest, store: LogitStore, views: ViewsStamp, tmp_path: Path
) -> None:
    decoder = ShardDecoder(
        manifest, sample_rates_hz=(16_000, RATE_HZ), seconds=SECONDS, views=views, batch_size=3, processes=2
    )
    dataset = joined(manifest, store, tmp_path)
    seen = 0
    for batch in decoder.batches(manifest.shards[0]):
        for number, teachers in enumerate(batch.views):
            students = dataset[ViewedRows(np.array(batch.rows), np.full(len(batch.rows), number))]
            assert torch.equal(students.waveforms, teachers.waveforms[RATE_HZ])
            shifts = torch.zeros(len(batch.rows), 2) if teachers.edge_shifts_hz is None else teachers.edge_shifts_hz
            assert students.edge_shifts_hz is not None
            assert torch.equal(students.edge_shifts_hz, shifts.long())
            assert students.teacher_logits[:, 0].tolist() == [10.0 * row + number for row in batch.rows]
            seen += len(batch.rows)
    assert seen == 7 * VIEWS
    decoder.close()


def test_views_of_a_clip_are_not_alike(manifest: Manifest, store: LogitStore, tmp_path: Path) -> None:
    batch = joined(manifest, store, tmp_path)[ViewedRows(np.array([2, 2, 2]), np.arange(3))]
    assert len({tuple(sound.tolist()) for sound in batch.waveforms}) == 3
    assert batch.edge_shifts_hz is not None
    assert len({tuple(shift.tolist()) for shift in batch.edge_shifts_hz}) == 3


def test_view_that_begins_earlier_ends_in_sound(manifest: Manifest, store: LogitStore, tmp_path: Path) -> None:
    config = ViewConfig(seed=0, max_gain_db=0.0)
    dataset = joined(manifest, store, tmp_path, views=ViewsStamp(count=60, config=config), logits=None)
    batch = dataset[ViewedRows(np.zeros(60, np.int64), np.arange(60))]
    silent_at_the_end = (batch.waveforms[:, -320:] == 0).all(dim=1)
    assert not silent_at_the_end.any(), "the clip goes on behind what is listened to"
    assert (batch.waveforms[:, :320] == 0).all(dim=1).any(), "later views begin with silence"


def test_decoded_audio_from_the_cache_gives_the_same_views(
    manifest: Manifest, store: LogitStore, views: ViewsStamp, tmp_path: Path
) -> None:
    samples = round(RATE_HZ * kept_seconds(SECONDS, views))
    cache = WaveformCache(CacheFolder(tmp_path, 1e9), manifest, sample_rate_hz=RATE_HZ, samples=samples)
    wanted = ViewedRows(np.array([0, 1, 2, 3]), np.array([2, 1, 0, 1]))
    plain, cached = joined(manifest, store, tmp_path), joined(manifest, store, tmp_path, cache=cache)
    for _ in range(2):  # filled, then read
        torch.testing.assert_close(cached[wanted].waveforms, plain[wanted].waveforms, rtol=0, atol=2.0**-15)  # 16 bits
    assert cache.read(3) is not None


def test_evaluation_of_a_dataset_with_views_hears_clips_as_they_are(
    manifest: Manifest, store: LogitStore, tmp_path: Path
) -> None:
    batch = joined(manifest, store, tmp_path)[np.array([1, 4])]
    clean = JoinedDataset(manifest, sample_rate_hz=RATE_HZ, seconds=SECONDS)[np.array([1, 4])]
    torch.testing.assert_close(batch.waveforms, clean.waveforms)
    assert batch.edge_shifts_hz is None
    assert batch.teacher_logits[:, 0].tolist() == [10.0, 40.0]


def test_view_of_a_step_is_the_same_wherever_the_run_begins_and_whoever_asks(
    manifest: Manifest, store: LogitStore, tmp_path: Path
) -> None:
    dataset = joined(manifest, store, tmp_path)
    batches = [np.random.default_rng(step).permutation(8) for step in range(40)]

    def views_of(batches: list[np.ndarray], first_step: int, seed: int = 1) -> list[list[int]]:
        requests = dataset.requests(batches, seed=seed, first_step=first_step)
        return [request.views.tolist() for request in requests if isinstance(request, ViewedRows)]

    whole = views_of(batches, 0)
    assert views_of(batches[7:], 7) == whole[7:]
    assert views_of([rows[3:] for rows in batches], 0) == [views[3:] for views in whole]
    assert views_of(batches, 0, seed=2) != whole
    counts = np.bincount(np.concatenate(whole), minlength=VIEWS)
    assert (np.abs(counts - 320 / VIEWS) < 25).all(), counts
    of_first_clip = [views[int(np.flatnonzero(rows == 0)[0])] for rows, views in zip(batches, whole, strict=True)]
    assert set(of_first_clip) == {0, 1, 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_show_the_views_that_are_asked_for(
    manifest: Manifest, store: LogitStore, tmp_path: Path, workers: int
) -> None:
    dataset = joined(manifest, store, tmp_path)
    requests = list(dataset.requests([np.arange(4), np.arange(4, 8)], seed=3, first_step=0))
    for ours, theirs in zip(
        batch_loader(dataset, requests, workers=workers), map(dataset.__getitem__, requests), strict=True
    ):
        assert torch.equal(ours.waveforms, theirs.waveforms)
        assert torch.equal(ours.edge_shifts_hz, theirs.edge_shifts_hz)  # pyright: ignore[reportArgumentType]
        assert torch.equal(ours.teacher_logits, theirs.teacher_logits)
        assert len(ours.only_valid().edge_shifts_hz) == int(ours.valid.sum())  # pyright: ignore[reportArgumentType]


def test_streamed_shards_show_the_views_that_are_asked_for(
    manifest: Manifest, store: LogitStore, tmp_path: Path
) -> None:
    dataset = joined(manifest, store, tmp_path)
    sampler = build_sampler(manifest, sampling="uniform", batch_size=4, seed=3, stream=StreamConfig())
    for step, batch in enumerate(load_steps(dataset, sampler, end_step=4, workers=0)):
        expected = dataset[dataset.request(batch.rows.numpy(), seed=3, step=step)]
        assert torch.equal(batch.waveforms, expected.waveforms)
        assert torch.equal(batch.teacher_logits, expected.teacher_logits)
        assert batch.edge_shifts_hz is not None


def test_runs_on_views_do_not_depend_on_workers_and_can_do_without_views(
    manifest: Manifest, store: LogitStore, tmp_path: Path
) -> None:
    def trained(name: str, **settings: object) -> dict[str, torch.Tensor]:
        config = TrainStudentConfig(
            data=manifest.location,
            store=store.location,
            run=str(tmp_path / name),
            cache=str(tmp_path / "cache"),
            model="mn01",
            epochs=1,
            batch_size=4,
            max_failed=0.5,
            workers=0,
            device="cpu",
        )
        run(replace(config, **settings))  # pyright: ignore[reportArgumentType]
        return load_file(tmp_path / name / "last.safetensors")

    def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)

    consistent = trained("consistent")
    assert equal(trained("again", workers=1), consistent)
    inconsistent = trained("inconsistent", consistent_views=False)
    assert not equal(inconsistent, consistent)
    plain = make_store(tmp_path / "plain", manifest, None)
    assert equal(trained("plain-run", store=plain.location), inconsistent)
