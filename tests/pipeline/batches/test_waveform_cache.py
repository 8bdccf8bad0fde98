import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches.join import JoinedDataset
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset import audio
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import UsageError
from pipeline.storage.cache import CacheFolder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Manifest:
    return read_manifest(make_dataset(tmp_path_factory.mktemp("data"), clips=4))


def open_cache(folder: Path, manifest: Manifest, samples: int = 100) -> WaveformCache:
    return WaveformCache(CacheFolder(folder, 1e9), manifest, sample_rate_hz=8000, samples=samples)


def sixteen_bits() -> np.ndarray:
    whole = np.random.default_rng(0).integers(-(2**15), 2**15, 100)
    whole[:2] = -(2**15), 2**15 - 1
    return (whole / 2**15).astype(np.float32)


def test_a_waveform_comes_back_bit_for_bit_in_every_process(tmp_path: Path, manifest: Manifest) -> None:
    cache, waveform = open_cache(tmp_path, manifest), sixteen_bits()
    assert cache.read(2) is None
    cache.write(2, waveform)
    for reader in (cache, open_cache(tmp_path, manifest), pickle.loads(pickle.dumps(cache))):
        np.testing.assert_array_equal(reader.read(2), waveform)
        assert reader.read(1) is None
        assert reader.read(3) is None


def test_what_is_given_the_first_time_is_what_is_read_again(tmp_path: Path, manifest: Manifest) -> None:
    cache, waveform = open_cache(tmp_path, manifest), np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    given = cache.write(1, waveform)
    np.testing.assert_array_equal(cache.read(1), given)
    assert given.dtype == np.float32
    assert 0 < np.abs(given - waveform).max() <= 2**-16


def test_sound_beyond_full_scale_is_not_cut(tmp_path: Path, manifest: Manifest) -> None:
    cache, loud = open_cache(tmp_path, manifest), np.linspace(-3, 2, 100, dtype=np.float32)
    given = cache.write(0, loud)
    np.testing.assert_array_equal(cache.read(0), given)
    np.testing.assert_allclose(given, loud, atol=3 / 2**16)


def test_sound_of_16_bits_at_the_models_rate_is_the_same_with_and_without(tmp_path: Path, manifest: Manifest) -> None:
    cache = WaveformCache(CacheFolder(tmp_path, 1e9), manifest, sample_rate_hz=16000, samples=8000)
    rows = np.arange(4)
    without, fills, reads = (
        JoinedDataset(manifest, sample_rate_hz=16000, seconds=0.5, cache=kept)[rows].waveforms
        for kept in (None, cache, cache)
    )
    assert cache.read(3) is not None
    assert torch.equal(without, fills)
    assert torch.equal(without, reads)


def test_a_dataset_without_clips_fits(tmp_path: Path, manifest: Manifest) -> None:
    empty = Manifest(manifest.location, manifest.table.slice(0, 0), manifest.vocabulary)
    assert open_cache(tmp_path, empty).keeps(0)


def test_silence_is_a_waveform_too(tmp_path: Path, manifest: Manifest) -> None:
    cache = open_cache(tmp_path, manifest)
    cache.write(0, np.zeros(100, np.float32))
    np.testing.assert_array_equal(cache.read(0), np.zeros(100))


def test_a_record_that_was_written_in_part_is_not_believed(tmp_path: Path, manifest: Manifest) -> None:
    cache = open_cache(tmp_path, manifest)
    cache.write(0, np.ones(100, np.float32))
    with cache.path.open("r+b") as stream:
        stream.seek(150)
        stream.write(bytes(8))
    assert cache.read(0) is None


def test_other_clips_rates_and_lengths_have_another_file(
    tmp_path: Path, manifest: Manifest, make_dataset: Callable[..., Path]
) -> None:
    other = read_manifest(make_dataset(tmp_path / "other", clips=4, broken=(1,)))
    paths = {
        open_cache(tmp_path, manifest).path,
        open_cache(tmp_path, other).path,
        open_cache(tmp_path, manifest, samples=50).path,
        WaveformCache(CacheFolder(tmp_path, 1e9), manifest, sample_rate_hz=16000, samples=100).path,
    }
    assert len(paths) == 4


def test_what_other_decoders_made_is_decoded_again(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(tmp_path, manifest).write(0, np.ones(100, np.float32))
    assert open_cache(tmp_path, manifest).read(0) is not None
    monkeypatch.setattr(audio, "version", lambda package: "0.0.1" if package == "av" else version(package))
    audio.decoding_identity.cache_clear()
    try:
        assert open_cache(tmp_path, manifest).read(0) is None
    finally:
        audio.decoding_identity.cache_clear()


def test_a_disk_without_room_for_a_clip_is_refused_before_the_run(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 220, 220))
    with pytest.raises(UsageError, match=r"no room for a decoded clip .* and 2.2e-07 GB are free"):
        open_cache(tmp_path, manifest)
    open_cache(tmp_path, manifest, samples=90)


def test_where_not_all_fits_a_fixed_share_is_kept_and_a_larger_one_contains_it(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    manifest = read_manifest(make_dataset(tmp_path / "data", clips=40))
    kept = {}
    for clips in (10, 20, 40):
        cache = WaveformCache(CacheFolder(tmp_path / "cache", clips * 212), manifest, sample_rate_hz=8000, samples=100)
        for row in range(40):
            np.testing.assert_array_equal(cache.write(row, sixteen_bits()), sixteen_bits())
        kept[clips] = {row for row in range(40) if cache.read(row) is not None}
    assert kept[10] < kept[20] < kept[40] == set(range(40))
    assert abs(len(kept[10]) - 10) <= 2


def test_a_share_that_is_kept_changes_nothing_of_what_is_given(tmp_path: Path, manifest: Manifest) -> None:
    small = WaveformCache(CacheFolder(tmp_path / "small", 250), manifest, sample_rate_hz=8000, samples=100)
    waveform = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    rounded = open_cache(tmp_path, manifest).write(0, waveform)
    for row in range(4):
        np.testing.assert_array_equal(small.write(row, waveform), rounded)


def test_clips_of_own_lengths_come_back_as_long_as_they_were_and_longer_ones_are_decoded_again(
    tmp_path: Path, manifest: Manifest
) -> None:
    cache = WaveformCache(CacheFolder(tmp_path, 1e9), manifest, sample_rate_hz=8000, samples=100, own_lengths=True)
    for row, samples in enumerate((1, 40, 101, 100)):
        cache.write(row, np.arange(1, samples + 1, dtype=np.float32))
    lengths = [None if (kept := cache.read(row)) is None else len(kept) for row in range(4)]
    assert lengths == [1, 40, None, 100]
    assert open_cache(tmp_path, manifest).read(1) is None  # whoever pads has another file


def test_clips_whose_labels_are_set_aside_share_a_file(tmp_path: Path, manifest: Manifest) -> None:
    assert open_cache(tmp_path, manifest.with_label_share(0.5)).path == open_cache(tmp_path, manifest).path
