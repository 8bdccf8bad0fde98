import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from webdataset.compat import WebDataset

from pipeline.dataset.clips import Clip
from pipeline.dataset.manifest import SCHEMA, Manifest
from pipeline.dataset.shards import open_shard, read_clip_bytes
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import ShardError
from pipeline.storage.files import RangeReader

CLIPS = [
    Clip(clip_id="--PJHxphWEs", audio=b"flac bytes", format="flac"),
    Clip(clip_id="my.clip v1/2", audio=b"w" * 1500, format="wav"),
    Clip(clip_id="音" * 60, audio=b"opus bytes", format="opus"),
]


def write(folder: Path, shard: str = "train-000000.tar") -> list[tuple[int, int]]:
    with open_shard(str(folder), shard) as writer:
        for clip in CLIPS:
            writer.write(clip, {"labels": ["/m/09x0r"], "frames": 3})
    return writer.ranges


def manifest_of(
    folder: Path, ranges: list[tuple[int, int]], vocabulary: Vocabulary, crc32: int | None = None
) -> Manifest:
    rows = [
        {"clip_id": clip.clip_id, "shard": "train-000000.tar", "offset": offset, "size": size, "format": clip.format}
        | {"labels": [0], "crc32": crc32}
        for clip, (offset, size) in zip(CLIPS, ranges, strict=True)
    ]
    return Manifest(str(folder), pa.Table.from_pylist(rows, SCHEMA), vocabulary)


def test_plain_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    samples = list(WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["clip_id"] for sample in samples] == [clip.clip_id for clip in CLIPS]
    assert [sample[clip.format] for sample, clip in zip(samples, CLIPS, strict=True)] == [clip.audio for clip in CLIPS]
    assert json.loads(samples[0]["json"]) == {"clip_id": "--PJHxphWEs", "labels": ["/m/09x0r"], "frames": 3}


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    one, two = (tmp_path / name / "train-000000.tar" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in tar} == {(0, 0, 0, "", 0o644)}


def test_clips_are_read_in_place(tmp_path: Path, five_classes: Vocabulary) -> None:
    manifest = manifest_of(tmp_path, write(tmp_path), five_classes)
    reader = RangeReader(tmp_path)
    assert [read_clip_bytes(reader, manifest, row) for row in range(3)] == [clip.audio for clip in CLIPS]


def test_a_shard_behind_a_url_is_written_and_read_alike(five_classes: Vocabulary) -> None:
    with open_shard("memory://shards/one", "train-000000.tar") as writer:
        for clip in CLIPS:
            writer.write(clip, {})
    rows = [
        {"clip_id": clip.clip_id, "shard": "train-000000.tar", "offset": offset, "size": size, "format": clip.format}
        | {"labels": [0]}
        for clip, (offset, size) in zip(CLIPS, writer.ranges, strict=True)
    ]
    manifest = Manifest("memory://shards/one", pa.Table.from_pylist(rows, SCHEMA), five_classes)
    reader = RangeReader(manifest.location)
    assert [read_clip_bytes(reader, manifest, row) for row in range(3)] == [clip.audio for clip in CLIPS]


def test_other_bytes_than_the_manifests_are_noticed(tmp_path: Path, five_classes: Vocabulary) -> None:
    manifest = manifest_of(tmp_path, write(tmp_path), five_classes, crc32=12345)
    with pytest.raises(ShardError, match=r"the bytes of clip --PJHxphWEs .*pipeline index"):
        read_clip_bytes(RangeReader(tmp_path), manifest, 0)


def test_a_shard_that_ends_too_early_is_noticed(tmp_path: Path, five_classes: Vocabulary) -> None:
    manifest = manifest_of(tmp_path, [(512, 10), (10**9, 1500), (0, 2**31 - 1)], five_classes)
    write(tmp_path)
    for row in (1, 2):
        with pytest.raises(ShardError, match="are not those that the manifest was made from"):
            read_clip_bytes(RangeReader(tmp_path), manifest, row)


def test_a_missing_shard_is_named(tmp_path: Path, five_classes: Vocabulary) -> None:
    manifest = manifest_of(tmp_path, [(0, 1), (0, 1), (0, 1)], five_classes)
    with pytest.raises(ShardError, match=r"can't read train-000000\.tar"):
        read_clip_bytes(RangeReader(tmp_path), manifest, 0)


def test_a_shard_whose_making_fails_is_absent(tmp_path: Path) -> None:
    def make() -> None:
        with open_shard(str(tmp_path), "train-000000.tar") as writer:
            writer.write(CLIPS[0], {})
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        make()
    assert list(tmp_path.iterdir()) == []


def test_ranges_are_those_of_the_tar(tmp_path: Path) -> None:
    ranges = write(tmp_path)
    content = (tmp_path / "train-000000.tar").read_bytes()
    assert [content[offset : offset + size] for offset, size in ranges] == [clip.audio for clip in CLIPS]
    assert np.diff([offset for offset, _ in ranges]).min() > 0
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert len(tar.getnames()) == 6
