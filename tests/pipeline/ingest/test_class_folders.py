import os
from pathlib import Path, PureWindowsPath

import pytest
from published_copies import RealClip

from pipeline.commands.index_dataset import IndexConfig
from pipeline.commands.index_dataset import run as index
from pipeline.commands.ingest_folder import IngestFolderConfig, run
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest import audio_files


@pytest.fixture
def folder(tmp_path: Path, mp3s: list[RealClip]) -> Path:
    """dog/1, dog/deep/2, cat/1 and a sound by its YouTube id."""
    folder = tmp_path / "sounds"
    names = ["dog/1.mp3", "dog/deep/2.MP3", "cat/1.mp3", f"bird/Y{mp3s[3].clip_id}_30.000.mp3"]
    for name, clip in zip(names, mp3s, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip.audio)
    return folder


def ingest(folder: Path, **settings: object):
    options: dict = {"clips_per_shard": 2, "workers": 2} | settings
    return run(IngestFolderConfig(audio=str(folder), out=str(folder.parent / "train"), **options))


def test_paths_in_a_folder_are_separated_alike_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = [
        ("C:\\sounds", ["dog"], []),
        ("C:\\sounds\\dog", ["deep"], ["1.wav"]),
        ("C:\\sounds\\dog\\deep", [], ["2.wav"]),
    ]
    monkeypatch.setattr(audio_files, "Path", PureWindowsPath)
    monkeypatch.setattr(audio_files, "_is_new", lambda folder, visited: True)
    monkeypatch.setattr(os, "walk", lambda folder, followlinks: walked)
    found = audio_files.find_audio_files(PureWindowsPath("C:\\sounds"))  # pyright: ignore[reportArgumentType]
    assert [file.path for file in found] == ["dog/1.wav", "dog/deep/2.wav"]


def test_each_folder_is_a_class_and_only_folders_tell_equal_names_apart(
    folder: Path, mp3s: list[RealClip], contents
) -> None:
    ingest(folder)
    assert read_manifest(folder.parent / "train").vocabulary.names == ("bird", "cat", "dog")
    assert contents(folder.parent / "train") == {
        "dog/1": ([2], mp3s[0].audio),
        "dog/deep/2": ([2], mp3s[1].audio),
        "cat/1": ([1], mp3s[2].audio),
        mp3s[3].clip_id: ([0], mp3s[3].audio),
    }


def test_names_may_be_kept_whole(folder: Path, mp3s: list[RealClip], contents) -> None:
    ingest(folder, whole_names=True)
    assert f"bird/Y{mp3s[3].clip_id}_30.000" in contents(folder.parent / "train")


def test_a_class_list_gives_the_order_and_refuses_other_folders(folder: Path, contents, rejected) -> None:
    (folder / "loose.wav").write_bytes(b"x")
    own = folder.parent / "own.csv"
    own.write_text('index,mid,display_name\n0,/m/dog,"dog"\n1,cat,"Katze"\n')
    ingest(folder, classes=str(own))
    found = contents(folder.parent / "train")
    assert {clip_id: labels for clip_id, (labels, _) in found.items()} == {
        "dog/1": [0],
        "dog/deep/2": [0],
        "cat/1": [1],
    }
    assert sorted(reason for *_, reason in rejected(folder.parent / "train")) == [
        "in no class's folder",
        "unknown label",
    ]


def test_shards_hold_a_mix_of_classes_in_an_order_that_stays(tmp_path: Path, mp3s: list[RealClip]) -> None:
    for number in range(40):
        path = tmp_path / "sounds" / "ab"[number // 20] / f"{number}.mp3"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mp3s[0].audio)
    ingest(tmp_path / "sounds", clips_per_shard=20)
    labels = read_manifest(tmp_path / "train").table["labels"].to_pylist()
    assert 5 <= sum(label == [0] for label in labels[:20]) <= 15
    first = (tmp_path / "train" / "manifest.parquet").read_bytes()
    ingest(tmp_path / "sounds", clips_per_shard=20, overwrite=True)
    assert (tmp_path / "train" / "manifest.parquet").read_bytes() == first


def test_a_name_that_is_no_text_is_listed(folder: Path, mp3s: list[RealClip], rejected) -> None:
    with open(os.fsencode(folder) + b"/dog/caf\xe9.mp3", "wb") as stream:
        stream.write(mp3s[0].audio)
    ingest(folder)
    assert rejected(folder.parent / "train") == [(None, "dog/caf\\xe9.mp3", "name not in UTF-8")]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    with pytest.raises(ManifestError, match="holds 0 classes"):
        ingest(tmp_path / "sounds")


def test_files_and_folders_whose_names_are_no_text_are_left_out_and_named(
    folder: Path, mp3s: list[RealClip], contents, rejected
) -> None:
    for name in (b"f\xe9e/x.mp3", b"dog/caf\xe9.mp3", b"dog/d\xe9ep/y.mp3"):
        path = os.fsencode(folder) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(mp3s[0].audio)
    assert ingest(folder).rejected == {"name not in UTF-8": 3}
    assert read_manifest(folder.parent / "train").vocabulary.names == ("bird", "cat", "dog")
    assert len(contents(folder.parent / "train")) == 4
    assert sorted(rejected(folder.parent / "train")) == [
        (None, "dog/caf\\xe9.mp3", "name not in UTF-8"),
        (None, "dog/d\\xe9ep/y.mp3", "name not in UTF-8"),
        (None, "f\\xe9e/x.mp3", "name not in UTF-8"),
    ]


def test_folders_called_by_numbers_are_of_the_list_that_is_named(folder: Path, contents) -> None:
    for number, name in enumerate(("bird", "cat", "dog")):
        (folder / name).rename(folder / str(2 - number))
    own = folder.parent / "own.csv"
    own.write_text('index,mid,display_name\n0,/m/dog,"dog"\n1,cat,"Katze"\n2,bird,"Vogel"\n')
    ingest(folder, classes=str(own))
    assert {clip_id[0]: labels for clip_id, (labels, _) in contents(folder.parent / "train").items()}["0"] == [0]
    ingest(folder, overwrite=True)
    assert read_manifest(folder.parent / "train").vocabulary.names == ("0", "1", "2")


def test_sounds_of_unknown_labels_are_taken_from_any_folder_where_a_class_list_is_named(folder: Path) -> None:
    (folder / "loose.mp3").write_bytes((folder / "dog/1.mp3").read_bytes())
    with pytest.raises(UsageError, match="--unlabelled needs the class list"):
        ingest(folder, unlabelled=True)
    own = folder.parent / "own.csv"
    own.write_text("index,mid,display_name\n0,/m/cow,cow\n")
    assert ingest(folder, unlabelled=True, classes=str(own)).clips == 5
    manifest = read_manifest(folder.parent / "train")
    assert manifest.unlabelled.all()
    assert not manifest.label_counts().any()
    index(IndexConfig(str(folder.parent / "train")))  # the json beside each sound says so, too
    assert read_manifest(folder.parent / "train").unlabelled.all()
