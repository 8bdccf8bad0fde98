from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from published_copies import RealClip, write_passt_hdf5

from pipeline.commands.ingest_passt import IngestPasstConfig, run
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.hdf5_files import dataset


def ingest(tmp_path: Path, *files: Path, **settings: object):
    options: dict = {"clips_per_shard": 3, "workers": 2} | settings
    return run(IngestPasstConfig(hdf5=tuple(map(str, files)), out=str(tmp_path / "train"), **options))


def test_the_mp3_bytes_and_the_packed_labels_are_kept(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    result = ingest(tmp_path, write_passt_hdf5(tmp_path / "balanced_train_segments_mp3.hdf", mp3s))
    assert (result.clips, result.shards, result.rejected) == (4, 2, {})
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s}


def test_the_unbalanced_files_names_are_the_same_clips(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    ingest(tmp_path, write_passt_hdf5(tmp_path / "unbalanced_train_segments_mp3.hdf", mp3s, prefix="07/"))
    assert list(contents(tmp_path / "train")) == [clip.clip_id for clip in mp3s]


def test_the_first_of_several_files_wins(tmp_path: Path, mp3s: list[RealClip], contents, rejected) -> None:
    first = write_passt_hdf5(tmp_path / "a.hdf", mp3s[:2])
    other_bytes = [replace(mp3s[1], audio=mp3s[3].audio), mp3s[2]]
    second = write_passt_hdf5(tmp_path / "b.hdf", other_bytes)
    ingest(tmp_path, first, second)
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s[:3]}
    assert rejected(tmp_path / "train") == [(mp3s[1].clip_id, f"{second}/Y{mp3s[1].clip_id}.mp3", "repeated clip id")]


def test_a_broken_row_is_listed_and_the_others_are_taken(
    tmp_path: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    broken = replace(mp3s[1], audio=b"<html>no MP3</html>")
    file = write_passt_hdf5(tmp_path / "a.hdf", [mp3s[0], broken, replace(mp3s[2], audio=b"")])
    ingest(tmp_path, file)
    assert list(contents(tmp_path / "train")) == [mp3s[0].clip_id]
    assert [(clip_id, reason) for clip_id, _, reason in rejected(tmp_path / "train")] == [
        (mp3s[1].clip_id, "not audio"),
        (mp3s[2].clip_id, "empty file"),
    ]


def test_a_folder_stands_for_its_files(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    (tmp_path / "mp3").mkdir()
    write_passt_hdf5(tmp_path / "mp3" / "b.h5", mp3s[:2])
    write_passt_hdf5(tmp_path / "mp3" / "a.hdf5", mp3s[2:])
    ingest(tmp_path, tmp_path / "mp3")
    assert list(contents(tmp_path / "train")) == [clip.clip_id for clip in [*mp3s[2:], *mp3s[:2]]]


def test_bits_for_more_classes_than_the_list_has_are_refused(tmp_path: Path, mp3s: list[RealClip]) -> None:
    path = write_passt_hdf5(tmp_path / "wide.hdf", mp3s)
    with h5py.File(path, "a") as file:
        dataset(file, "target")[1, 65] |= 1  # the 528th class
    with pytest.raises(ManifestError, match=r"wide\.hdf: target has bits for more than 527 classes.*--classes"):
        ingest(tmp_path, path)


def test_what_is_no_such_file_is_an_error_that_says_so(tmp_path: Path, mp3s: list[RealClip]) -> None:
    (tmp_path / "text.hdf").write_text("no HDF5")
    with pytest.raises(ManifestError, match=r"text\.hdf: is no readable HDF5"):
        ingest(tmp_path, tmp_path / "text.hdf")
    with h5py.File(tmp_path / "other.hdf", "w") as file:
        file["waveform"] = np.zeros(3)
    with pytest.raises(ManifestError, match="has no dataset audio_name; it holds waveform"):
        ingest(tmp_path, tmp_path / "other.hdf")
    path = write_passt_hdf5(tmp_path / "narrow.hdf", mp3s)
    with h5py.File(path, "a") as file:
        narrow = dataset(file, "target")[:, :65]
        del file["target"]
        file["target"] = narrow
    with pytest.raises(ManifestError, match=r"target is uint8 \(4, 65\); 527 classes are 66 bytes"):
        ingest(tmp_path, path)
    with h5py.File(path, "a") as file:
        del file["target"]
        file["target"] = np.zeros((3, 66), np.uint8)
    with pytest.raises(ManifestError, match="not of one length"):
        ingest(tmp_path, path)
    with pytest.raises(UsageError, match=r"absent\.hdf: there is no such file"):
        ingest(tmp_path, tmp_path / "absent.hdf")
    with pytest.raises(UsageError, match="has to be on this machine"):
        run(IngestPasstConfig(hdf5=("s3://bucket/a.hdf",), out=str(tmp_path / "train")))
    assert not (tmp_path / "train").exists()
