import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.commands.index_dataset import IndexConfig
from pipeline.commands.index_dataset import run as run_index
from pipeline.commands.ingest_audioset import IngestAudiosetConfig, run
from pipeline.dataset.manifest import MANIFEST_NAME, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.dataset_folder import UNFINISHED
from pipeline.storage.files import RangeReader

IDS = ["--PJHxphWEs", "_0abcdefghi", "Yabcdefghij", "abcdefgh_30", "zzzzzzzzzzz"]
SPELLINGS = ["{}.wav", "Y{}.flac", "{}_30.000.ogg", "{}_30.000_40.000.wav", "sub/folder/{}_30_40.FLAC"]


def sound(format: str, seed: int, seconds: float = 0.1) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, round(16_000 * seconds))
    soundfile.write(stream, noise, 16_000, format=format)
    return stream.getvalue()


def write_segments(path: Path, ids: list[str]) -> Path:
    path.write_text(
        "# a\n# b\n# YTID\n" + "".join(f'{clip_id}, 30.000, 40.000, "/m/09x0r,/m/04rlf"\n' for clip_id in ids)
    )
    return path


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder with each clip in another of the field's spellings."""
    folder = tmp_path / "audio"
    for seed, (clip_id, spelling) in enumerate(zip(IDS, SPELLINGS, strict=True)):
        path = folder / spelling.format(clip_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound(path.suffix[1:].upper(), seed))
    return folder


@pytest.fixture
def ingest(tmp_path: Path, audio: Path) -> Callable[..., Path]:
    def ingest(out: str = "train", ids: list[str] = IDS, **settings: object) -> Path:
        segments = write_segments(tmp_path / "segments.csv", ids)
        options = {"clips_per_shard": 2, "workers": 2} | settings
        run(IngestAudiosetConfig(segments=(str(segments),), audio=str(audio), out=str(tmp_path / out), **options))  # pyright: ignore[reportArgumentType]
        return tmp_path / out

    return ingest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejected(dataset: Path) -> list[tuple]:
    rows = pq.read_table(dataset / "rejected.parquet").to_pylist()
    return [(row["clip_id"], row["path"], row["reason"]) for row in rows]


def test_clips_are_found_in_every_spelling_and_keep_their_bytes(ingest: Callable[..., Path], audio: Path) -> None:
    dataset = ingest()
    manifest = read_manifest(dataset)
    assert manifest.clip_ids.to_pylist() == IDS
    assert manifest.shards == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert manifest.formats.to_pylist() == ["wav", "flac", "ogg", "wav", "flac"]
    assert manifest.label_matrix(np.arange(5)).sum(axis=1).tolist() == [2] * 5
    assert manifest.table["frames"].to_pylist() == [1600] * 5
    assert manifest.table["start_seconds"].to_pylist() == [30.0] * 5
    reader = RangeReader(dataset)
    for row, (clip_id, spelling) in enumerate(zip(IDS, SPELLINGS, strict=True)):
        assert read_clip_bytes(reader, manifest, row) == (audio / spelling.format(clip_id)).read_bytes()
    assert rejected(dataset) == []
    assert not (dataset / UNFINISHED).exists()


def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(ingest: Callable[..., Path]) -> None:
    one = contents(ingest("one/train", workers=1))
    assert contents(ingest("two/train", workers=4)) == one
    assert len(one) == 6


def test_an_index_of_the_shards_gives_the_manifest_again(ingest: Callable[..., Path]) -> None:
    dataset = ingest()
    before = (dataset / MANIFEST_NAME).read_bytes()
    (dataset / MANIFEST_NAME).unlink()
    run_index(IndexConfig(str(dataset)))
    assert (dataset / MANIFEST_NAME).read_bytes() == before


def test_what_is_left_out_is_listed_with_its_reason(ingest: Callable[..., Path], audio: Path, capsys) -> None:
    (audio / "unlisted000.wav").write_bytes(sound("WAV", 9))
    (audio / f"{IDS[1]}.wav").write_bytes(b"<html>not found</html>")  # preferred to Y….flac for its plain name
    (audio / f"Y{IDS[0]}.wav").write_bytes(sound("WAV", 9))
    (audio / f"{IDS[0]}.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    (audio / "linked_____.flac").symlink_to(audio / "absent.flac")
    dataset = ingest(ids=[*IDS, "linked_____", "missing____"])
    assert sorted(rejected(dataset), key=str) == sorted(
        [
            ("missing____", None, "file missing"),
            (IDS[0], f"Y{IDS[0]}.wav", "duplicate file"),
            (IDS[0], f"{IDS[0]}.m4a", "duplicate file"),
            (IDS[1], f"Y{IDS[1]}.flac", "duplicate file"),
            (IDS[1], f"{IDS[1]}.wav", "not audio"),
            ("linked_____", "linked_____.flac", "no such file"),
        ],
        key=str,
    )
    assert read_manifest(dataset).clip_ids.to_pylist() == [IDS[0], *IDS[2:]]
    shown = capsys.readouterr().out
    assert "not audio" in shown
    assert "file missing" in shown
    assert "1 files in no list" in shown


def test_a_shard_of_bad_clips_is_no_shard(ingest: Callable[..., Path], audio: Path) -> None:
    for clip_id, spelling in zip(IDS[:2], SPELLINGS[:2], strict=True):
        (audio / spelling.format(clip_id)).write_bytes(b"")
    dataset = ingest()
    assert read_manifest(dataset).shards == ["train-000001.tar", "train-000002.tar"]
    assert not (dataset / "train-000000.tar").exists()


def test_nothing_but_bad_clips_is_an_error(ingest: Callable[..., Path], audio: Path, tmp_path: Path) -> None:
    for clip_id, spelling in zip(IDS, SPELLINGS, strict=True):
        (audio / spelling.format(clip_id)).write_bytes(b"")
    with pytest.raises(ManifestError, match="holds no clip that can be used \\(5 empty file"):
        ingest()
    assert not (tmp_path / "train" / MANIFEST_NAME).exists()
    with pytest.raises(ManifestError, match="none of the 1 listed clips has a file"):
        ingest(ids=["elsewhere__"])


def test_a_finished_dataset_is_replaced_only_when_asked(ingest: Callable[..., Path]) -> None:
    dataset = ingest(clips_per_shard=1)
    with pytest.raises(UsageError, match=r"is a finished dataset.*--overwrite"):
        ingest()
    ingest(overwrite=True)
    assert sorted(path.name for path in dataset.glob("*.tar")) == read_manifest(dataset).shards
    assert len(read_manifest(dataset).shards) == 3


def test_tars_of_somebody_else_are_left_alone(ingest: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("precious.tar", "train-000000.tar"):
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / name).write_bytes(b"precious")
        with pytest.raises(UsageError, match=f"did not make, such as {name}"):
            ingest()
        assert contents(tmp_path / "train") == {name: b"precious"}
        shutil.rmtree(tmp_path / "train")


def test_a_killed_run_leaves_no_manifest_and_the_next_one_goes_on(
    ingest: Callable[..., Path], tmp_path: Path, audio: Path
) -> None:
    ids = [f"clip{number:07}" for number in range(60)]
    for number, clip_id in enumerate(ids):
        (audio / f"{clip_id}.flac").write_bytes(sound("FLAC", number, seconds=1))
    segments, out = write_segments(tmp_path / "segments.csv", ids), tmp_path / "killed" / "train"
    flags = {"--segments": segments, "--audio": audio, "--out": out, "--clips-per-shard": 2, "--workers": 1}
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "ingest",
        "audioset",
        *(str(part) for flag in flags.items() for part in flag),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(out.glob("train-*.tar"))) < 4 and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / MANIFEST_NAME).exists()
    with pytest.raises(ManifestError, match=r"has no manifest\.parquet"):
        read_manifest(out)
    done = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    assert len(done) >= 4
    ingest("killed/train", ids=ids)
    # The last tar may have been published without its ledger; it was made again.
    assert sum(path.stat().st_mtime_ns == written for path, written in done.items()) >= len(done) - 1
    assert contents(out) == contents(ingest("whole/train", ids=ids))


@pytest.fixture
def stopped_ingest(ingest: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An ingest that is stopped when all its shards are made, before the manifest."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def run_and_stop(**settings: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.ingest.dataset_folder.finish_folder", stop)
            with pytest.raises(KeyboardInterrupt):
                ingest(**settings)

    return run_and_stop


def test_a_stopped_run_with_other_settings_leaves_none_of_its_shards(
    ingest: Callable[..., Path], stopped_ingest: Callable[..., None]
) -> None:
    stopped_ingest(clips_per_shard=1)
    assert contents(ingest()) == contents(ingest("other/train"))


def test_a_file_that_changed_since_the_stopped_run_is_read_again(
    ingest: Callable[..., Path], stopped_ingest: Callable[..., None], audio: Path
) -> None:
    stopped_ingest()
    (audio / SPELLINGS[0].format(IDS[0])).write_bytes(sound("WAV", 77))
    assert contents(ingest()) == contents(ingest("other/train"))


def test_a_dataset_may_be_made_behind_a_url(tmp_path: Path, audio: Path, ingest: Callable[..., Path]) -> None:
    segments = write_segments(tmp_path / "segments.csv", IDS)
    out = f"memory://{tmp_path.name}/train"
    run(IngestAudiosetConfig(segments=(str(segments),), audio=str(audio), out=out, clips_per_shard=2))
    manifest = read_manifest(out)
    local = read_manifest(ingest())
    assert manifest.table.equals(local.table)
    assert read_clip_bytes(RangeReader(out), manifest, 4) == (audio / SPELLINGS[4].format(IDS[4])).read_bytes()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"clips_per_shard": 0}, "--clips-per-shard is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"name": "../up"}, "--name '../up'"),
        ({"segments": ()}, "--segments needs"),
        ({"add": True, "overwrite": True}, "choose one"),
    ],
)
def test_settings_out_of_range_are_wrong_usage(settings: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        IngestAudiosetConfig(**{"segments": ("a.csv",), "audio": "audio", "out": "train"} | settings)


@pytest.mark.parametrize(("audio", "complaint"), [("s3://bucket", "has to be a local folder"), ("no", "is no folder")])
def test_the_audio_has_to_be_a_local_folder(tmp_path: Path, audio: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        run(IngestAudiosetConfig(segments=("a.csv",), audio=audio, out=str(tmp_path / "train")))


def test_a_folder_that_links_to_itself_is_walked_once(ingest: Callable[..., Path], audio: Path) -> None:
    (audio / "sub" / "loop").symlink_to(audio)
    assert rejected(ingest()) == []


def test_real_sounds_are_ingested(sounds_dir: Path, tmp_path: Path) -> None:
    lines = (sounds_dir / "eval_segments.csv").read_text().splitlines(keepends=True)
    (tmp_path / "few.csv").write_text("".join(lines[:15]))
    config = IngestAudiosetConfig(
        segments=(str(tmp_path / "few.csv"),), audio=str(sounds_dir / "audio"), out=str(tmp_path / "eval")
    )
    result = run(config)
    assert (result.clips, result.rejected, result.notes) == (12, {}, {"files in no list": 896 + 245 - 12})
    assert len(read_manifest(tmp_path / "eval")) == 12
