import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.batches.shard_streams import stream_shard
from pipeline.commands.index_dataset import IndexConfig, run
from pipeline.commands.verify_path import VerifyConfig
from pipeline.commands.verify_path import run as verify
from pipeline.dataset.manifest import MAX_CLIP_BYTES, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.errors import ManifestError, UsageError, VerificationError
from pipeline.ingest.dataset_folder import UNFINISHED
from pipeline.storage.files import RangeReader

SPEECH, MUSIC = 0, 137
AUDIOSET = str(Path(__file__).parents[3] / "manifests" / "audioset_classes.csv")
"""Numbers in the jsons are of this list only where somebody says so."""
# What becomes of the bench's tars: the reasons, and whether anything is left.
EXPECTED_REASONS = {
    "ok.tar": {},
    "pax_long.tar": {},
    "dotted_key.tar": {},
    "truncated.tar": {"damaged shard": 1},
    "duplicate_keys.tar": {"repeated member": 4},
    "path_traversal.tar": {"unsafe name": 4},
    "missing_audio.tar": {"json without audio": 1},
    "missing_json.tar": {"audio without json": 1},
    "bad_audio.tar": {"empty file": 1},  # the undecodable one is for the decoder to find
}


def write_tar(path: Path, files: dict[str, bytes | dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def labels(dataset: Path) -> dict[str, list[int]]:
    table = read_manifest(dataset).table
    return dict(zip(table["clip_id"].to_pylist(), table["labels"].to_pylist(), strict=True))


def reasons(dataset: Path) -> list[tuple[str, str]]:
    return [(row["path"], row["reason"]) for row in pq.read_table(dataset / "rejected.parquet").to_pylist()]


def test_every_tar_of_the_bench_ends_as_its_manifest_says(torture_dir: Path, tmp_path: Path) -> None:
    entries = json.loads((torture_dir / "MANIFEST.json").read_text())["entries"]
    tars = {Path(entry["file"]).name: entry for entry in entries if entry["file"].startswith("tars/")}
    for name, entry in tars.items():
        dataset = tmp_path / name
        dataset.mkdir()
        (dataset / name).write_bytes((torture_dir / entry["file"]).read_bytes())
        if name not in EXPECTED_REASONS:
            assert entry["expect"] in {"reject", "either"}
            with pytest.raises(ManifestError, match="holds no clip that can be used"):
                run(IndexConfig(str(dataset)))
            continue
        result = run(IndexConfig(str(dataset)))
        found = labels(dataset)
        assert {Path(key).name for key in entry["good_keys"]} <= found.keys()
        assert set(map(tuple, found.values())) == {(SPEECH,)}
        assert result.rejected == EXPECTED_REASONS[name]
        if entry["expect"] == "decode":
            assert result.rejected == {}
            assert len(found) == len(entry["good_keys"])
    assert not (tmp_path / "evil.flac").exists()


def test_a_compressed_tar_is_refused_naming_the_compression(torture_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "gzip.tar.gz").write_bytes((torture_dir / "tars" / "gzip.tar.gz").read_bytes())
    with pytest.raises(ManifestError, match="compressed with gzip"):
        run(IndexConfig(str(tmp_path), classes=AUDIOSET))


def test_dotted_names_are_clips_of_their_own(torture_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "dotted.tar").write_bytes((torture_dir / "tars" / "dotted_key.tar").read_bytes())
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert list(labels(tmp_path)) == ["my.clip.v1", "AAAAAAAAAA0", "my.clip.v2"]


@pytest.mark.parametrize(
    ("description", "clip_id"),
    [
        ({"clip_id": "one", "id": "two"}, "one"),
        ({"id": "two"}, "two"),
        ({"id": 17}, "17"),
        ({"ytid": "--PJHxphWEs"}, "--PJHxphWEs"),
        ({"video_id": "_0abcdefghi"}, "_0abcdefghi"),
        ({}, "folder/00000123"),
        ({"id": None}, "folder/00000123"),
    ],
)
def test_the_id_is_the_jsons_or_else_the_keys(tmp_path: Path, description: dict, clip_id: str) -> None:
    write_tar(tmp_path / "a.tar", {"folder/00000123.wav": b"w", "folder/00000123.json": {"labels": [0], **description}})
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert list(labels(tmp_path)) == [clip_id]


@pytest.mark.parametrize(
    ("key", "clip_id"),
    [
        ("audio/bal/Y--PJHxphWEs", "--PJHxphWEs"),
        ("--PJHxphWEs_30.000_40.000", "--PJHxphWEs"),
        ("./dog", "dog"),
        ("my%2Eclip", "my.clip"),
    ],
)
def test_a_key_gives_the_id_that_a_files_name_would(tmp_path: Path, key: str, clip_id: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{key}.flac": b"f", f"{key}.json": {"labels": []}})
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert list(labels(tmp_path)) == [clip_id]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"labels": ["/m/04rlf", "/m/09x0r"]}, [SPEECH, MUSIC]),
        ({"labels": [137, 0, 137]}, [SPEECH, MUSIC]),
        ({"labels": []}, []),
        ({"mids": ["/m/09x0r"]}, [SPEECH]),
        ({"label": "Speech"}, [SPEECH]),
        ({"label": ["Speech", "Music"], "label_id": [0, 137]}, [SPEECH, MUSIC]),
        ({"label": "a man talks", "label_id": 0}, [SPEECH]),
        ({"human_labels": ["Male speech, man speaking"]}, [1]),
    ],
)
def test_labels_are_read_in_the_spellings_in_use(tmp_path: Path, description: dict, expected: list[int]) -> None:
    write_tar(tmp_path / "a.tar", {"a.mp3": b"m", "a.json": description})
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert labels(tmp_path) == {"a": expected}


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"labels": ["/m/none"]}, "unknown label"),
        ({"labels": [527]}, "unknown label"),
        ({"labels": [-1]}, "unknown label"),
        ({"labels": [True]}, "unknown label"),
        ({"labels": [None]}, "unknown label"),
        ({"label": ["Speech"], "label_id": [3]}, "label fields disagree"),
        ({"caption": "a man talks"}, "no labels"),
        (b"{", "unreadable json"),
        (b"[" * 100_000, "unreadable json"),
        (b"[1]", "unreadable json"),
        (b"\xff", "unreadable json"),
        (b'{"labels": [0]}' + b" " * 2_000_000, "unreadable json"),
        ({"labels": [0], "id": "a\nb"}, "unusable clip id"),
        ({"labels": [0], "id": "\ud800"}, "unusable clip id"),
        ({"labels": [0], "id": "x" * 2000}, "unusable clip id"),
    ],
)
def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path: Path, description: dict | bytes, reason: str) -> None:
    write_tar(
        tmp_path / "a.tar", {"good.wav": b"w", "good.json": {"labels": [0]}, "bad.wav": b"w", "bad.json": description}
    )
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert list(labels(tmp_path)) == ["good"]
    assert reason in {found for _, found in reasons(tmp_path)}


def test_a_clip_in_two_shards_is_taken_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.wav": b"first", "x.json": {"id": "dog", "labels": [0]}})
    write_tar(tmp_path / "b.tar", {"y.wav": b"second", "y.json": {"id": "dog", "labels": [1]}, "z.wma": b"z"})
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    manifest = read_manifest(tmp_path)
    assert read_clip_bytes(RangeReader(tmp_path), manifest, 0) == b"first"
    assert reasons(tmp_path) == [("b.tar/y", "repeated clip id"), ("b.tar/z", "unsupported format")]


def test_clips_that_only_have_a_name_in_common_are_told_apart_by_their_tars(tmp_path: Path) -> None:
    for tar in "abc":
        shared = {} if tar == "c" else {"1.wav": tar.encode(), "1.json": {"label": "Speech"}}
        write_tar(tmp_path / f"{tar}.tar", {**shared, f"{tar}.wav": b"w", f"{tar}.json": {"label": "Music"}})
    assert run(IndexConfig(str(tmp_path))).rejected == {}
    found = labels(tmp_path)
    assert [clip_id for clip_id in found if "/" not in clip_id] == ["a", "b", "c"]
    told_apart = [clip_id for clip_id in found if "/" in clip_id]
    assert [clip_id[0] + clip_id[-2:] for clip_id in told_apart] == ["a/1", "b/1"]
    verify(VerifyConfig(str(tmp_path)))
    (tmp_path / "manifest.parquet").unlink()
    verify(VerifyConfig(str(tmp_path), repair=True))
    assert labels(tmp_path) == found


def test_tars_behind_an_end_mark_are_indexed_verified_and_streamed(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(
            tmp_path / "parts" / f"{name}.tar", {f"{name}.wav": name.encode(), f"{name}.json": {"label": "Speech"}}
        )
    joined = tmp_path / "data" / "joined.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join((tmp_path / "parts" / f"{name}.tar").read_bytes() for name in "ab"))
    run(IndexConfig(str(joined.parent)))
    assert list(labels(joined.parent)) == ["a", "b"]
    assert verify(VerifyConfig(str(joined.parent))).looked_at["clips"] == 2
    clips = read_manifest(joined.parent).clips
    assert list(stream_shard(clips, "joined.tar", [0, 1])) == [(0, b"a"), (1, b"b")]
    with joined.open("ab") as stream:
        stream.write(b"a signature")
    with pytest.raises(VerificationError, match="faults: 1"):
        verify(VerifyConfig(str(joined.parent)))
    assert run(IndexConfig(str(joined.parent))).rejected == {"damaged shard": 1}


def test_a_list_that_was_named_once_is_named_for_good_but_audiosets_only_when_it_is_said(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_tar(data / "a.tar", {"a.wav": b"a", "a.json": {"labels": [0]}})
    with pytest.raises(ManifestError, match=r"1 class number of no list\). The first: a.tar/a: 0: .* by --classes"):
        run(IndexConfig(str(data)))
    (tmp_path / "own.csv").write_text('index,mid,display_name\n0,bell,"Door bell"\n')
    run(IndexConfig(str(data), classes=str(tmp_path / "own.csv")))
    run(IndexConfig(str(data)))
    assert labels(data) == {"a": [0]}
    run(IndexConfig(str(data), classes=AUDIOSET))
    with pytest.raises(ManifestError, match="1 class number of no list"):
        run(IndexConfig(str(data)))


def test_a_tar_whose_name_is_no_text_is_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.wav": b"a", "a.json": {"label": "Speech"}})
    os.link(tmp_path / "a.tar", os.fsencode(tmp_path) + b"/caf\xe9.tar")
    run(IndexConfig(str(tmp_path)))
    assert reasons(tmp_path) == [("caf\\xe9.tar", "name not in UTF-8")]


def test_members_need_not_be_neighbours_and_others_are_no_matter(tmp_path: Path) -> None:
    files = {
        "a.wav": b"a",
        "README": b"",
        "b.wav": b"b",
        "b.txt": b"",
        "b.json": {"labels": [0]},
        "a.json": {"labels": [1]},
    }
    write_tar(tmp_path / "a.tar", files)
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert labels(tmp_path) == {"a": [1], "b": [0]}


def test_unlabelled_clips_are_kept_when_asked(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {"a.flac": b"a", "b.flac": b"b", "b.json": {}, "c.flac": b"c", "c.json": {"label": "?"}}
    )
    with pytest.raises(ManifestError, match="1 audio without json"):
        run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert run(IndexConfig(str(tmp_path), keep_unlabelled=True)).clips == 2
    assert labels(tmp_path) == {"a": [], "b": []}
    assert read_manifest(tmp_path).unlabelled.all()


def test_a_json_that_says_that_there_are_no_labels_is_believed(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {"a.flac": b"a", "a.json": {"labels": []}, "b.flac": b"b", "b.json": {"labels": None}}
    )
    run(IndexConfig(str(tmp_path), keep_unlabelled=True, classes=AUDIOSET))
    manifest = read_manifest(tmp_path)
    assert dict(zip(manifest.clip_ids.to_pylist(), manifest.unlabelled.tolist(), strict=True)) == {
        "a": False,
        "b": True,
    }


def test_own_classes_are_given_once_and_kept(tmp_path: Path) -> None:
    dataset = tmp_path / "data"
    write_tar(dataset / "a.tar", {"a.wav": b"a", "a.json": {"label": "Door bell"}})
    (tmp_path / "own.csv").write_text('index,mid,display_name\n0,bell,"Door bell"\n')
    run(IndexConfig(str(dataset), classes=str(tmp_path / "own.csv")))
    run(IndexConfig(str(dataset)))
    assert read_manifest(dataset).vocabulary.names == ("Door bell",)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.wav": b"a", "a.json": {"labels": [0]}})
    run(IndexConfig(str(tmp_path), checksums=False, classes=AUDIOSET))
    assert read_manifest(tmp_path).crc32s.tolist() == [-1]
    run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    assert read_manifest(tmp_path).crc32s.tolist() == [0xE8B7BE43]


def test_a_folder_without_tars_or_with_an_unfinished_ingest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no tars"):
        run(IndexConfig(str(tmp_path), classes=AUDIOSET))
    write_tar(tmp_path / "a.tar", {"a.wav": b"a", "a.json": {"labels": [0]}})
    (tmp_path / UNFINISHED).mkdir()
    with pytest.raises(UsageError, match="an ingest was stopped here"):
        run(IndexConfig(str(tmp_path), classes=AUDIOSET))


def test_a_sound_of_more_than_two_gigabytes_is_left_out_unread(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"b.json": {"labels": [0]}, "c.wav": b"w", "c.json": {"labels": [0]}})
    ordinary = (tmp_path / "a.tar").read_bytes()
    huge = tarfile.TarInfo("b.wav")
    huge.size = MAX_CLIP_BYTES + 1
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(huge.tobuf(format=tarfile.GNU_FORMAT))
        stream.seek(512 + -(-huge.size // 512) * 512)  # a hole: no byte of it takes room
        stream.write(ordinary)
    run(IndexConfig(str(tmp_path), checksums=False, classes=AUDIOSET))
    assert labels(tmp_path) == {"c": [0]}
    assert reasons(tmp_path) == [("a.tar/b", "too long")]
