import re
from pathlib import Path

from published_copies import RealClip, write_tar

from pipeline.commands.ingest_webdataset import IngestWebdatasetConfig, run


def ingest(tmp_path: Path, *tars: Path, **settings: object):
    options: dict = {"clips_per_shard": 3, "workers": 1} | settings
    return run(IngestWebdatasetConfig(tars=tuple(map(str, tars)), out=str(tmp_path / "train"), **options))


def write_numbered(path: Path, clips: list[RealClip]) -> Path:
    """Clips called by their number in the tar, as many writers of shards do."""
    files: dict = {}
    for number, clip in enumerate(clips):
        files |= {f"{number:06}.mp3": clip.audio, f"{number:06}.json": {"label": "Speech"}}
    return write_tar(path, files)


def test_clips_that_only_share_their_number_with_others_are_added_once(
    tmp_path: Path, mp3s: list[RealClip], contents
) -> None:
    first, second = write_numbered(tmp_path / "a.tar", mp3s[:2]), write_numbered(tmp_path / "b.tar", mp3s[2:])
    ingest(tmp_path, first)
    assert ingest(tmp_path, second, add=True).added == 2
    held = contents(tmp_path / "train")
    assert list(held)[:2] == ["000000", "000001"]
    assert all(re.fullmatch(r"b-[0-9a-f]{8}/00000[01]", clip_id) for clip_id in list(held)[2:])
    assert [audio for _, audio in held.values()] == [clip.audio for clip in mp3s]
    for again in ([first], [second], [first, second]):
        assert ingest(tmp_path, *again, add=True).rejected == {"repeated clip id": 2 * len(again)}
        assert contents(tmp_path / "train") == held


def test_clips_that_were_told_apart_are_known_again_one_by_one(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    first, second = write_numbered(tmp_path / "a.tar", mp3s[:2]), write_numbered(tmp_path / "b.tar", mp3s[2:])
    ingest(tmp_path, first, second)
    held = contents(tmp_path / "train")
    ingest(tmp_path, first, add=True)
    ingest(tmp_path, second, add=True)
    assert contents(tmp_path / "train") == held


def test_encoded_clips_are_known_again(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    first, second = write_numbered(tmp_path / "a.tar", mp3s[:2]), write_numbered(tmp_path / "b.tar", mp3s[2:])
    ingest(tmp_path, first, transcode="flac")
    assert ingest(tmp_path, second, transcode="flac", add=True).added == 2
    held = contents(tmp_path / "train")
    assert ingest(tmp_path, first, second, transcode="flac", add=True).added == 0
    assert contents(tmp_path / "train") == held
