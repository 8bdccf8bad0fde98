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

    times = {"clip_id": "a", "labels": ["Speech"], "start_seconds": 30.0, "end_seconds": 32.361}
    files = {"a.mp3": mp3s[0].audio, "a.json": times, "b.mp3": b"no sound", "b.json": {"labels": ["Speech"]}}
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


FOUR = "index,mid,display_name\n0,/m/a,a\n1,/m/b,b\n2,/m/c,c\n3,/m/d,d\n"


@pytest.mark.parametrize(
    ("labels", "with_list", "without"),
    [
        ([0, 0, 1, 0], [2], "label vector of another length"),
        ([True, False, False, True], [0, 3], "label vector of another length"),
        ([0, 3], [0, 3], "class number of no list"),
        (2, [2], "class number of no list"),
        ([0, 1, 1], "label vector of another length", "label vector of another length"),
        (["a", "c"], [0, 2], "unknown label"),
    ],
)
def test_numbers_in_a_json_are_of_the_list_that_is_named(
    tmp_path: Path, mp3s: list[RealClip], contents, labels: object, with_list: object, without: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.mp3": mp3s[0].audio, "a.json": {"labels": labels}})
    (tmp_path / "own.csv").write_text(FOUR)
    with pytest.raises(ManifestError, match=f"1 {without}"):
        ingest(tmp_path, tar)
    if isinstance(with_list, str):
        with pytest.raises(ManifestError, match=f"1 {with_list}"):
            ingest(tmp_path, tar, classes=str(tmp_path / "own.csv"))
        return
    ingest(tmp_path, tar, classes=str(tmp_path / "own.csv"))
    assert contents(tmp_path / "train")["a"][0] == with_list


def test_all_clips_of_a_tar_say_whether_numbers_are_vectors(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    files: dict = {}
    for number, (clip, labels) in enumerate(zip(mp3s, ([0, 1], [1, 0], [0, 0], [1, 1]), strict=True)):
        files |= {f"{number}.mp3": clip.audio, f"{number}.json": {"labels": labels}}
    (tmp_path / "own.csv").write_text("index,mid,display_name\n0,/m/no,no\n1,/m/yes,yes\n")
    ingest(tmp_path, write_tar(tmp_path / "a.tar", files), classes=str(tmp_path / "own.csv"))
    found = {clip_id: labels for clip_id, (labels, _) in contents(tmp_path / "train").items()}
    assert found == {"0": [1], "1": [0], "2": [], "3": [0, 1]}


def write_numbered(path: Path, clips: list[RealClip]) -> Path:
    """Clips called by their number in the tar, as many writers of shards do."""
    files: dict = {}
    for number, clip in enumerate(clips):
        files |= {f"{number:06}.mp3": clip.audio, f"{number:06}.json": {"label": "Speech"}}
    return write_tar(path, files)


def test_clips_that_have_only_their_number_in_a_tar_in_common_are_all_kept(
    tmp_path: Path, mp3s: list[RealClip], contents
) -> None:
    tars = [write_numbered(tmp_path / folder / "00.tar", mp3s[at : at + 2]) for at, folder in ((0, "a"), (2, "b"))]
    assert ingest(tmp_path, *tars).rejected == {}
    found = contents(tmp_path / "train")
    assert [audio for _, audio in found.values()] == [clip.audio for clip in mp3s]
    assert [clip_id[-7:] for clip_id in found] == ["/000000", "/000001"] * 2
    ingest(tmp_path, *tars[::-1], overwrite=True)
    assert contents(tmp_path / "train") == found
    ingest(tmp_path, tars[0], overwrite=True)
    assert list(contents(tmp_path / "train")) == ["000000", "000001"]


def test_one_tar_in_two_places_is_one(tmp_path: Path, mp3s: list[RealClip], rejected) -> None:
    tars = [write_numbered(tmp_path / folder / "00.tar", mp3s[:1]) for folder in "ab"]
    assert ingest(tmp_path, *tars).rejected == {"repeated clip id": 1}
    assert [path for _, path, _ in rejected(tmp_path / "train")] == [f"{tars[1]}/000000.mp3"]


@pytest.mark.parametrize("write", [write_webdataset, write_numbered])
def test_tars_that_were_joined_are_read_to_their_end(tmp_path: Path, mp3s: list[RealClip], contents, write) -> None:
    parts = [write(tmp_path / f"{number}.tar", [clip]).read_bytes() for number, clip in enumerate(mp3s)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(parts) + bytes(5000))
    assert ingest(tmp_path, joined).rejected == {}
    found = contents(tmp_path / "train")
    assert [audio for _, audio in found.values()] == [clip.audio for clip in mp3s]
    if write is write_webdataset:
        assert list(found) == [clip.clip_id for clip in mp3s]
    else:
        assert [clip_id.partition("/")[2] for clip_id in found] == ["000000", "1/000000", "2/000000", "3/000000"]


def test_what_is_no_tar_behind_the_last_one_is_named(tmp_path: Path, mp3s: list[RealClip], contents, rejected) -> None:
    tar = write_webdataset(tmp_path / "a.tar", mp3s)
    tar.write_bytes(tar.read_bytes() + b"more")
    ingest(tmp_path, tar)
    assert len(contents(tmp_path / "train")) == 4
    assert rejected(tmp_path / "train") == [(None, str(tar), "damaged shard")]


def test_no_tars_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of"):
        ingest(tmp_path, tmp_path)
    with pytest.raises(ManifestError, match="there is no clip to pack"):
        ingest(tmp_path, write_tar(tmp_path / "a.tar", {"README": b"x"}))
    assert not (tmp_path / "train").exists()
