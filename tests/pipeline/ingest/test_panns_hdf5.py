import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
from published_copies import RealClip, panns_waveform, write_panns_hdf5

from pipeline.commands.ingest_panns import IngestPannsConfig, run
from pipeline.errors import ManifestError
from pipeline.ingest.hdf5_files import dataset

SAMPLES = 16_000


def ingest(tmp_path: Path, *files: Path):
    return run(IngestPannsConfig(hdf5=tuple(map(str, files)), out=str(tmp_path / "train"), clips_per_shard=2))


def test_waveforms_become_flac_without_loss(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    ingest(tmp_path, write_panns_hdf5(tmp_path / "balanced_train.h5", [*mp3s], SAMPLES))
    found = contents(tmp_path / "train")
    assert list(found) == [clip.clip_id for clip in mp3s]
    for clip in mp3s:
        labels, audio = found[clip.clip_id]
        samples, rate = soundfile.read(io.BytesIO(audio), dtype="int16")
        assert audio.startswith(b"fLaC")
        assert soundfile.info(io.BytesIO(audio)).subtype == "PCM_16"
        assert (labels, rate) == (clip.labels, 32_000)
        np.testing.assert_array_equal(samples, panns_waveform(clip, SAMPLES))


def test_rows_of_clips_that_were_not_there_are_skipped_and_counted(
    tmp_path: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    file = write_panns_hdf5(tmp_path / "eval.h5", [None, mp3s[0], None, mp3s[1]], SAMPLES)
    result = ingest(tmp_path, file)
    assert (result.clips, result.rejected) == (2, {"empty row": 2})
    assert list(contents(tmp_path / "train")) == [mp3s[0].clip_id, mp3s[1].clip_id]
    assert rejected(tmp_path / "train") == [(None, f"{file}/row 0", "empty row"), (None, f"{file}/row 2", "empty row")]


def test_silence_with_a_name_is_a_clip(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    file = write_panns_hdf5(tmp_path / "eval.h5", [mp3s[0]], SAMPLES)
    with h5py.File(file, "a") as hdf5:
        dataset(hdf5, "waveform")[0] = 0
    ingest(tmp_path, file)
    assert list(contents(tmp_path / "train")) == [mp3s[0].clip_id]


def test_the_first_versions_float_waveforms_keep_24_bits(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    file = write_panns_hdf5(tmp_path / "old.h5", [mp3s[0]], SAMPLES, dtype="float32")
    ingest(tmp_path, file)
    samples, _ = soundfile.read(io.BytesIO(contents(tmp_path / "train")[mp3s[0].clip_id][1]))
    wanted = panns_waveform(mp3s[0], SAMPLES, "float32").clip(-1, 1)
    np.testing.assert_allclose(samples, wanted, atol=2**-23)
    with h5py.File(file, "a") as hdf5:
        dataset(hdf5, "waveform")[0, 5] = np.nan
    with pytest.raises(ManifestError, match="non-finite samples"):
        run(IngestPannsConfig(hdf5=(str(file),), out=str(tmp_path / "nan")))


def test_a_file_without_its_rate_or_with_other_classes_is_refused(tmp_path: Path, mp3s: list[RealClip]) -> None:
    file = write_panns_hdf5(tmp_path / "eval.h5", [mp3s[0]], SAMPLES)
    with h5py.File(file, "a") as hdf5:
        del hdf5.attrs["sample_rate"]
    with pytest.raises(ManifestError, match="sample_rate is missing"):
        ingest(tmp_path, file)
    own = tmp_path / "own.csv"
    own.write_text('index,mid,display_name\n0,bell,"Door bell"\n')
    with pytest.raises(ManifestError, match=r"target is \(1, 527\), but the class list has 1 classes"):
        run(IngestPannsConfig(hdf5=(str(file),), out=str(tmp_path / "train"), classes=str(own)))


def test_a_target_that_is_no_vector_of_zeros_and_ones_costs_its_row(
    tmp_path: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    file = write_panns_hdf5(tmp_path / "eval.h5", [*mp3s[:3]], SAMPLES)
    with h5py.File(file, "a") as hdf5:
        target = dataset(hdf5, "target")[:].astype(np.float32)
        target[0] *= 0.5
        del hdf5["target"]
        hdf5["target"] = target
    assert ingest(tmp_path, file).rejected == {"label vector of other numbers": 1}
    found = contents(tmp_path / "train")
    assert {clip_id: labels for clip_id, (labels, _) in found.items()} == {c.clip_id: c.labels for c in mp3s[1:3]}


def test_rows_that_share_a_name_are_told_apart_and_no_name_is_fatal(
    tmp_path: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    files = [write_panns_hdf5(tmp_path / f"{name}.h5", [*mp3s[:2]], SAMPLES) for name in "ab"]
    for file, names in zip(files, ([b"0.wav", b"caf\xe9.wav"], [b"0.wav", b"x/1.wav"]), strict=True):
        with h5py.File(file, "a") as hdf5:
            dataset(hdf5, "audio_name")[:] = names
    assert ingest(tmp_path, *files).rejected == {"name not in UTF-8": 1}
    ids = list(contents(tmp_path / "train"))
    assert [(clip_id[:2], clip_id[-5:]) for clip_id in ids] == [("a-", "row 0"), ("b-", "row 0"), ("x/", "x/1")]
