"""What all sources share, shown with a source that is quick to make."""

import io
import wave
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from published_copies import real_clips, write_passt_hdf5

from pipeline.commands.index_dataset import IndexConfig
from pipeline.commands.index_dataset import run as run_index
from pipeline.commands.ingest_folder import IngestFolderConfig, run
from pipeline.commands.ingest_passt import IngestPasstConfig
from pipeline.commands.ingest_passt import run as run_passt
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.errors import ManifestError, PipelineError, UsageError
from pipeline.ingest.dataset_folder import UNFINISHED
from pipeline.storage.files import RangeReader


def sound(number: int) -> bytes:
    """A WAV of four samples that tell the number."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(bytes([number, 0] * 4))
    return stream.getvalue()


def write_sounds(folder: Path, names: str, first: int = 0, label: str = "dog") -> Path:
    for number, name in enumerate(names, start=first):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{name}.wav").write_bytes(sound(number))
    return folder


@pytest.fixture
def ingest(tmp_path: Path) -> Callable[..., Path]:
    def ingest(audio: Path, out: str = "train", **settings: object) -> Path:
        options: dict = {"clips_per_shard": 2, "workers": 2} | settings
        run(IngestFolderConfig(audio=str(audio), out=str(tmp_path / out), **options))
        return tmp_path / out

    return ingest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clips(dataset: Path) -> dict[str, bytes]:
    manifest, reader = read_manifest(dataset), RangeReader(dataset)
    return {str(clip_id): read_clip_bytes(reader, manifest, row) for row, clip_id in enumerate(manifest.clip_ids)}


def rejected(dataset: Path) -> list[tuple]:
    return [tuple(row.values()) for row in pq.read_table(dataset / "rejected.parquet").to_pylist()]


@pytest.fixture
def first(ingest: Callable[..., Path], tmp_path: Path) -> Path:
    """A dataset of dog/a, dog/b, dog/c in two shards, one file left out."""
    audio = write_sounds(tmp_path / "first", "abc")
    (audio / "dog" / "bad.wav").write_bytes(b"")
    return ingest(audio)


def test_clips_are_added_in_shards_of_their_own_and_those_that_were_there_stay(
    ingest: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    before = contents(first)
    old_rows = read_manifest(first).table.to_pylist()
    more = write_sounds(tmp_path / "more", "cde", first=50)
    ingest(more, add=True)
    manifest = read_manifest(first)
    assert manifest.table.to_pylist()[:3] == old_rows
    assert manifest.shards == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert {name: data for name, data in contents(first).items() if name in before and name.endswith(".tar")} == {
        name: data for name, data in before.items() if name.endswith(".tar")
    }
    assert {clip_id.removeprefix("dog/") for clip_id in clips(first)} == set("abcde")
    assert clips(first)["dog/c"] == sound(2)
    assert rejected(first) == [
        ("dog/bad", "dog/bad.wav", "empty file", ""),
        ("dog/c", "dog/c.wav", "repeated clip id", "what the dataset held already was taken"),
    ]
    assert not (first / UNFINISHED).exists()


def test_adding_the_same_again_changes_nothing(ingest: Callable[..., Path], first: Path, tmp_path: Path) -> None:
    more = write_sounds(tmp_path / "more", "de")
    ingest(more, add=True)
    before = contents(first)
    ingest(more, add=True)
    assert contents(first) == before


def test_a_clip_that_was_broken_in_the_first_source_comes_from_the_second(
    ingest: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    mended = write_sounds(tmp_path / "more", "x")
    (mended / "dog" / "bad.wav").write_bytes(sound(9))
    ingest(mended, add=True)
    assert clips(first)["dog/bad"] == sound(9)


def test_a_stopped_addition_leaves_the_dataset_readable_and_goes_on(
    ingest: Callable[..., Path], first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_sounds(tmp_path / "more", "cdefg", first=50)
    ingest(write_sounds(tmp_path / "first", "abc"), "whole/train")
    (tmp_path / "whole" / "train" / "rejected.parquet").write_bytes((first / "rejected.parquet").read_bytes())
    ingest(more, "whole/train", add=True)
    whole, before = contents(tmp_path / "whole" / "train"), clips(first)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("finish_folder", "write_manifest"):  # before and after the list of what was left out
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.ingest.dataset_folder.{place}", stop)
            with pytest.raises(KeyboardInterrupt):
                ingest(more, add=True)
        assert clips(first) == before
        assert (first / UNFINISHED).exists()
    with pytest.raises(UsageError, match="an ingest was stopped here"):
        run_index(IndexConfig(str(first)))
    made = {path: path.stat().st_mtime_ns for path in first.glob("*.tar")}
    ingest(more, add=True)
    assert {path: path.stat().st_mtime_ns for path in first.glob("*.tar")} == made
    assert contents(first) == whole


def test_only_a_finished_dataset_can_be_added_to(ingest: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no such folder"):
        ingest(write_sounds(tmp_path / "first", "abc"), add=True)


def test_added_labels_are_looked_up_in_the_classes_that_are_there(
    ingest: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    write_sounds(tmp_path / "more", "k", label="cat")
    ingest(write_sounds(tmp_path / "more", "d"), add=True)
    assert read_manifest(first).vocabulary.names == ("dog",)
    assert ("cat/k", "cat/k.wav", "unknown label", "'cat'") in rejected(first)
    own = tmp_path / "own.csv"
    own.write_text('index,mid,display_name\n0,cat,"cat"\n1,dog,"dog"\n')
    with pytest.raises(UsageError, match="is not the class list of"):
        ingest(tmp_path / "more", add=True, classes=str(own))


def test_an_addition_under_another_name_and_to_anybodys_tars_leaves_those_alone(
    ingest: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    (first / "other.tar").write_bytes(b"of no use, but not ours")
    ingest(write_sounds(tmp_path / "more", "d"), add=True, name="more")
    assert read_manifest(first).shards == ["train-000000.tar", "train-000001.tar", "more-000000.tar"]
    assert (first / "other.tar").read_bytes() == b"of no use, but not ours"
    (first / "more-000001.tar").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"did not make, such as more-000001\.tar"):
        ingest(write_sounds(tmp_path / "yet", "e"), add=True, name="more")


def test_nothing_to_pack_leaves_a_dataset_that_was_to_be_replaced(
    ingest: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    before = contents(first)
    own = tmp_path / "own.csv"
    own.write_text('index,mid,display_name\n0,cat,"cat"\n')
    with pytest.raises(ManifestError, match=r"there is no clip to pack \(4 unknown label\)"):
        ingest(tmp_path / "first", overwrite=True, classes=str(own))
    assert contents(first) == before


@pytest.mark.ray
def test_a_cluster_makes_the_same_bytes(
    ingest: Callable[..., Path], tmp_path: Path, shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = write_sounds(tmp_path / "first", "abcdefg")
    (audio / "dog" / "bad.wav").write_bytes(b"")
    here = contents(ingest(audio, "here/train", transcode="opus"))
    monkeypatch.chdir(tmp_path)  # paths that aren't absolute mean the same to the workers
    run(IngestFolderConfig(audio="first", out="there/train", clips_per_shard=2, transcode="opus", address="auto"))
    assert contents(tmp_path / "there" / "train") == here


@pytest.mark.ray
def test_what_stops_a_worker_is_told_and_the_rest_is_done_by_the_same_command(
    tmp_path: Path, shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.ingest.passt_hdf5 import PasstHdf5Source

    file = write_passt_hdf5(tmp_path / "a.hdf", real_clips("mp3", 2))
    config = IngestPasstConfig(hdf5=(str(file),), out=str(tmp_path / "train"), clips_per_shard=1, address="auto")
    whole = PasstHdf5Source.scan
    with monkeypatch.context() as patch:
        # The file goes away between planning and packing.
        patch.setattr(
            PasstHdf5Source, "scan", lambda *arguments: [*whole(*arguments), file.rename(tmp_path / "b")][:-1]
        )
        with pytest.raises(PipelineError, match=r"train-00000\d\.tar: .*a\.hdf: is no readable HDF5.*goes on"):
            run_passt(config)
    (tmp_path / "b").rename(file)
    assert run_passt(config).clips == 2


def test_every_sound_is_encoded_anew_when_asked_and_the_dataset_says_so(
    ingest: Callable[..., Path], tmp_path: Path
) -> None:
    audio = write_sounds(tmp_path / "first", "abc")
    dataset = ingest(audio, transcode="flac", sample_rate=32_000)
    rows = read_manifest(dataset).table.to_pylist()
    assert {(row["format"], row["sample_rate"], row["frames"]) for row in rows} == {("flac", 32_000, 8)}
    assert all(data.startswith(b"fLaC") for data in clips(dataset).values())
    before = (dataset / "manifest.parquet").read_bytes()
    (dataset / "manifest.parquet").unlink()
    run_index(IndexConfig(str(dataset)))
    assert (dataset / "manifest.parquet").read_bytes() == before


def test_a_stopped_run_with_another_encoding_leaves_none_of_its_shards(
    ingest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = write_sounds(tmp_path / "first", "abc")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ingest.dataset_folder.finish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest(audio, transcode="opus")
    assert contents(ingest(audio, transcode="flac")) == contents(ingest(audio, "other/train", transcode="flac"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"address": "ray://head:10001"}, "--address auto"),
        ({"sample_rate": 32_000}, "--sample-rate needs --transcode"),
        ({"sample_rate": 32_000, "transcode": "opus"}, "Opus knows only 8000, 12000, 16000, 24000, 48000 Hz"),
        ({"sample_rate": 100, "transcode": "flac"}, "--sample-rate is 100 Hz"),
    ],
)
def test_a_setting_that_cannot_be_is_wrong_usage(settings: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        IngestFolderConfig(audio="audio", out="train", **settings)
