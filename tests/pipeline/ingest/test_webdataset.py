from pathlib import Path

import pytest
from published_copies import RealClip, write_labelless_tar, write_segments, write_tar, write_webdataset

from pipeline.commands.ingest_webdataset import IngestWebdatasetConfig, run
from pipeline.errors import ManifestError, UsageError


def ingest(tmp_path: Path, *tars: Path | str, **settings: object):
    options: dict = {"clips_per_shard": 3, "workers": 2} | settings
    return run(IngestWebdatasetConfig(tars=tuple(map(str, tars)), out=str(tmp_path / "train"), **options))


def test_ids_and_labels_come_from_the_json(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    write_webdataset(tmp_path / "tars" / "0.tar", mp3s[:1])
    write_webdataset(tmp_path / "tars" / "1.tar", mp3s[1:])
    assert ingest(tmp_path, tmp_path / "tars").shards == 2
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s}


def test_tars_without_labels_get_them_from_the_lists(tmp_path: Path, mp3s: list[RealClip], contents, rejected) -> None:
    tar = write_labelless_tar(tmp_path / "bal_train00.tar", mp3s[:3])
    segments = write_segments(tmp_path / "balanced_train_segments.csv", mp3s[1:])
    result = ingest(tmp_path, tar, segments=(str(segments),))
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s[1:3]}
    assert result.notes == {"sounds in no list": 1}
    assert rejected(tmp_path / "train") == [(mp3s[3].clip_id, None, "file missing")]


def test_times_survive_and_undecodable_sounds_do_not(tmp_path: Path, mp3s: list[RealClip], contents, rejected) -> None:
    from pipeline.dataset.manifest import read_manifest

    times = {"clip_id": "a", "labels": [0], "start_seconds": 30.0, "end_seconds": 32.361}
    files = {"a.mp3": mp3s[0].audio, "a.json": times, "b.mp3": b"no sound", "b.json": {"labels": [0]}}
    tar = write_tar(tmp_path / "a.tar", {**files, "c.mp3": mp3s[1].audio})
    ingest(tmp_path, tar)
    row = read_manifest(tmp_path / "train").table.to_pylist()[0]
    assert (row["clip_id"], row["start_seconds"], row["end_seconds"]) == ("a", 30.0, pytest.approx(32.361))
    assert rejected(tmp_path / "train") == [
        (None, f"{tar}/c", "audio without json"),
        ("b", f"{tar}/b.mp3", "not audio"),
    ]
    ingest(tmp_path, tar, keep_unlabelled=True, overwrite=True)
    assert contents(tmp_path / "train")["c"] == ([], mp3s[1].audio)


def test_a_damaged_tar_gives_what_is_before_the_damage(
    tmp_path: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    tar = write_webdataset(tmp_path / "a.tar", mp3s)
    tar.write_bytes(tar.read_bytes()[: -len(mp3s[-1].audio) // 2 - 20_000])
    ingest(tmp_path, tar)
    assert list(contents(tmp_path / "train")) == [clip.clip_id for clip in mp3s[:3]]
    assert (None, str(tar), "damaged shard") in rejected(tmp_path / "train")


def test_every_tar_of_the_bench_is_survived(torture_dir: Path, tmp_path: Path, contents) -> None:
    ingest(tmp_path, torture_dir / "tars")
    assert "my.clip.v1" in contents(tmp_path / "train")
    assert not (tmp_path / "evil.flac").exists()


def test_tars_behind_a_url_are_read_in_place(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    import fsspec

    tar = write_webdataset(tmp_path / "a.tar", mp3s)
    with fsspec.open(f"memory://{tmp_path.name}/in/a.tar", "wb") as stream:
        stream.write(tar.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    ingest(tmp_path, f"memory://{tmp_path.name}/in")
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s}


def test_no_tars_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of"):
        ingest(tmp_path, tmp_path)
    with pytest.raises(ManifestError, match="there is no clip to pack"):
        ingest(tmp_path, write_tar(tmp_path / "a.tar", {"README": b"x"}))
    assert not (tmp_path / "train").exists()
