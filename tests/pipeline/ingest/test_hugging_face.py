from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_copies import RealClip, write_hugging_face_parquet

from pipeline.commands.ingest_huggingface import IngestHuggingfaceConfig, run
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.errors import DecodeError, ManifestError
from pipeline.ingest.hugging_face import HuggingFaceSource
from pipeline.ingest.sources import PlannedClip


def ingest(tmp_path: Path, *paths: Path | str):
    return run(IngestHuggingfaceConfig(parquet=tuple(map(str, paths)), out=str(tmp_path / "train"), clips_per_shard=3))


def test_bytes_and_labels_are_kept(tmp_path: Path, mp3s: list[RealClip], contents) -> None:
    write_hugging_face_parquet(tmp_path / "data" / "bal_train" / "00.parquet", mp3s[:3], row_group_size=2)
    write_hugging_face_parquet(tmp_path / "data" / "bal_train" / "01.parquet", mp3s[3:])
    result = ingest(tmp_path, tmp_path / "data" / "bal_train")
    assert (result.clips, result.shards, result.rejected) == (4, 2, {})
    assert contents(tmp_path / "train") == {clip.clip_id: (clip.labels, clip.audio) for clip in mp3s}


def test_rows_may_be_read_in_any_order_and_again(tmp_path: Path, mp3s: list[RealClip]) -> None:
    for name, clips in (("a", mp3s * 10), ("b", mp3s[::-1])):
        write_hugging_face_parquet(tmp_path / f"{name}.parquet", clips, row_group_size=21)
    source = HuggingFaceSource((str(tmp_path),))
    clips = [item for item in source.scan(audioset_vocabulary(), Counter()) if isinstance(item, PlannedClip)]
    by_id = {clip.clip_id: clip.audio for clip in mp3s}
    wanted = [clips[row] for row in (0, 1, 17, 1, 20, 21, 5, 41, 43, 40, 5, 5, 39)]
    with source.open_reader() as read:
        assert [handle() for handle in read(wanted)] == [by_id[clip.clip_id] for clip in wanted]


def test_what_cannot_be_used_is_listed(tmp_path: Path, mp3s: list[RealClip], contents, rejected) -> None:
    path = write_hugging_face_parquet(tmp_path / "a.parquet", [mp3s[0], replace(mp3s[1], audio=b"no sound"), *mp3s[2:]])
    rows = pq.read_table(path).to_pylist()
    rows[2]["audio"]["bytes"] = None
    rows[3]["labels"], rows[3]["human_labels"] = ["/m/none"], []
    rows.append({**rows[0], "video_id": "a\nb"})
    rows.append({**rows[0], "video_id": None})
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    ingest(tmp_path, path)
    assert list(contents(tmp_path / "train")) == [mp3s[0].clip_id]
    assert sorted(reason for _, _, reason in rejected(tmp_path / "train")) == [
        "no sound in the row",
        "not audio",
        "repeated clip id",  # without an id, the path is the name
        "unknown label",
        "unusable clip id",
    ]


def test_a_file_without_sounds_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video_id": ["a"], "caption": ["b"]}), tmp_path / "text.parquet")
    with pytest.raises(ManifestError, match=r"has no column audio of bytes and path.*it has video_id, caption"):
        ingest(tmp_path, tmp_path / "text.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(ManifestError, match=r"junk\.parquet: is not readable Parquet"):
        ingest(tmp_path, tmp_path / "junk.parquet")


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path: Path, mp3s: list[RealClip]) -> None:
    path = write_hugging_face_parquet(tmp_path / "a.parquet", mp3s, row_group_size=2)
    source = HuggingFaceSource((str(path),))
    clips = [item for item in source.scan(audioset_vocabulary(), Counter()) if isinstance(item, PlannedClip)]
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    with source.open_reader() as read:
        first, second, third, fourth = read(clips)
        for handle in (first, second):
            with pytest.raises(DecodeError, match="unreadable row"):
                handle()
        assert (third(), fourth()) == (mp3s[2].audio, mp3s[3].audio)
