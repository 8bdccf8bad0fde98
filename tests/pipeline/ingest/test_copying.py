"""`pipeline split`, `merge` and `reshard`: the clips stay what they are, and so do the logits of their ids."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_stores import fill_store

from pipeline.commands import merge_datasets, reshard_dataset, split_dataset
from pipeline.commands.index_dataset import IndexConfig
from pipeline.commands.index_dataset import run as run_index
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import ManifestError, ShardError, UsageError
from pipeline.ingest.copying import CopyConfig
from pipeline.ingest.dataset_folder import UNFINISHED
from pipeline.logits.store import open_store
from pipeline.storage.files import RangeReader

SMALL = CopyConfig(clips_per_shard=4, workers=2)


def reshard(dataset: Path, out: Path, copies: CopyConfig = SMALL) -> Path:
    reshard_dataset.run(reshard_dataset.ReshardConfig(str(dataset), out=str(out), copies=copies))
    return out


def merge(*datasets: Path, out: Path, classes: Path | None = None) -> Path:
    config = merge_datasets.MergeConfig(
        tuple(map(str, datasets)), out=str(out), classes=None if classes is None else str(classes), copies=SMALL
    )
    merge_datasets.run(config)
    return out


def split(dataset: Path, out: Path, **settings: object) -> tuple[Path, Path]:
    options: dict = {"eval_share": 0.3, "copies": SMALL} | settings
    split_dataset.run(
        split_dataset.SplitConfig(str(dataset), train=str(out / "train"), eval=str(out / "eval"), **options)
    )
    return out / "train", out / "eval"


def contents(dataset: Path) -> dict[str, tuple[list[str], bytes, tuple]]:
    """Clip id → its labels' mids, its bytes, what else the manifest knows."""
    manifest, reader = read_manifest(dataset), RangeReader(dataset)
    mids = [label.mid for label in manifest.vocabulary.classes]
    return {
        row["clip_id"]: (
            [mids[label] for label in row["labels"]],
            read_clip_bytes(reader, manifest, number),
            tuple(row[name] for name in ("format", "sample_rate", "frames", "start_seconds", "end_seconds")),
        )
        for number, row in enumerate(manifest.table.to_pylist())
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejected(dataset: Path) -> list[tuple[str, str]]:
    return [(row["clip_id"], row["reason"]) for row in pq.read_table(dataset / "rejected.parquet").to_pylist()]


@pytest.fixture
def dataset(make_dataset, tmp_path: Path) -> Path:
    """24 clips in shards of 10; three hold no sound, which is for a decoder to find."""
    return make_dataset(tmp_path / "all", broken=(3, 11, 12))


def write_store(folder: Path, manifest: Manifest) -> None:
    """A store whose logits say which clip they are of."""
    numbers = [int(clip_id.removeprefix("clip")) for clip_id in manifest.clip_ids.to_pylist()]
    fill_store(folder, manifest, np.add.outer(numbers, np.arange(len(manifest.vocabulary)) / 8))


def aligned(store: Path, dataset: Path, cache: Path) -> dict[str, list[float]]:
    manifest = read_manifest(dataset)
    found = open_store(str(store)).align(manifest, cache)
    assert found.has_logits.all()
    return dict(zip(manifest.clip_ids.to_pylist(), found.logits.tolist(), strict=True))


def test_a_store_made_before_gives_every_clip_the_same_logits_after_each_of_them(dataset: Path, tmp_path: Path) -> None:
    store, cache = tmp_path / "store", tmp_path / "cache"
    write_store(store, read_manifest(dataset))
    before, sounds = aligned(store, dataset, cache), contents(dataset)
    train, evaluation = split(dataset, tmp_path)
    merged = merge(evaluation, train, out=tmp_path / "merged")
    resharded = reshard(merged, tmp_path / "resharded", CopyConfig(clips_per_shard=7))
    for one in (merged, resharded):
        assert aligned(store, one, cache) == before
        assert contents(one) == sounds
    sides = [aligned(store, side, cache) for side in (train, evaluation)]
    assert sides[0] | sides[1] == before
    assert not sides[0].keys() & sides[1].keys()
    assert [len(read_manifest(resharded).rows_of_shard(shard)) for shard in read_manifest(resharded).shards] == [
        *(7, 7, 7, 3)
    ]


def test_the_manifest_of_a_copy_can_be_made_again_from_its_tars(dataset: Path, tmp_path: Path) -> None:
    copy = reshard(dataset, tmp_path / "copy")
    before = read_manifest(copy).table
    (copy / "manifest.parquet").unlink()
    run_index(IndexConfig(str(copy)))
    assert read_manifest(copy).table == before


def test_jsons_that_say_all_stay_byte_for_byte_and_others_are_completed(tmp_path: Path) -> None:
    ours = b'{"clip_id": "one",  "labels": ["/m/09x0r"], "note": "kept", "start_seconds": 1.5}'
    foreign = b'{"id": "two", "label": ["Speech"], "frames": 7, "note": "kept"}'
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for name, content in {"a.wav": b"1", "a.json": ours, "b.json": foreign, "b.wav": b"22"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    run_index(IndexConfig(str(tmp_path / "in")))
    with tarfile.open(reshard(tmp_path / "in", tmp_path / "out") / "out-000000.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]
    assert found["one.json"] == ours
    # `frames` of somebody else may mean anything, so the manifest does not know it, and it may not pass for a fact.
    assert json.loads(found["two.json"]) == {"clip_id": "two", "labels": ["/m/09x0r"], "id": "two", "note": "kept"}


def test_a_stopped_copy_goes_on_and_any_number_of_workers_gives_the_same_bytes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reshard(dataset, tmp_path / "a" / "out", CopyConfig(clips_per_shard=4, workers=1))
    from pipeline.ingest import ingesting

    made: list[str] = []
    pack = ingesting.pack_shard

    def stopping(location: str, shard, *args, **kwargs) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        pack(location, shard, *args, **kwargs)
        made.append(shard.name)

    monkeypatch.setattr(ingesting, "pack_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        reshard(dataset, tmp_path / "b" / "out")
    assert (tmp_path / "b" / "out" / UNFINISHED).exists()
    made.clear()
    monkeypatch.setattr(
        ingesting, "pack_shard", lambda *args, **kwargs: (made.append(args[1].name), pack(*args, **kwargs))
    )
    assert files(reshard(dataset, tmp_path / "b" / "out")) == files(whole)
    assert made == [f"out-{number:06}.tar" for number in range(2, 6)]


def test_a_split_stopped_between_its_sides_goes_on_with_the_second(dataset: Path, tmp_path: Path) -> None:
    train, evaluation = split(dataset, tmp_path)
    before = files(train), files(evaluation)
    for name in before[1]:
        (evaluation / name).unlink()
    split(dataset, tmp_path)
    assert (files(train), files(evaluation)) == before
    with pytest.raises(UsageError, match="is a finished dataset"):
        split(dataset, tmp_path, seed=1)


def test_the_first_dataset_has_a_clip_that_is_in_several(make_dataset, tmp_path: Path) -> None:
    first, second = make_dataset(tmp_path / "1", clips=6, broken=(2,)), make_dataset(tmp_path / "2", clips=12)
    merged = merge(first, second, out=tmp_path / "merged")
    assert contents(merged) == contents(second) | contents(first)
    assert sorted(rejected(merged)) == [(f"clip{number}", "repeated clip id") for number in range(6)]


def classes(folder: Path, *pairs: tuple[str, str]) -> Vocabulary:
    """Put other classes of the same number into the dataset."""
    vocabulary = Vocabulary(tuple(LabelClass(index, *pair) for index, pair in enumerate(pairs)))
    table = pq.read_table(folder / "manifest.parquet")
    pq.write_table(table.replace_schema_metadata({"vocabulary_sha256": vocabulary.sha256}), folder / "manifest.parquet")
    (folder / "classes.csv").write_bytes(vocabulary.to_csv_bytes())
    return vocabulary


def test_class_lists_are_joined_by_mid_behind_the_first(
    make_dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_dataset(tmp_path / "1", clips=2, classes=2), make_dataset(tmp_path / "2", clips=4, classes=3)
    classes(second, ("/new", "New"), ("/t/1", "tone 1"), ("/t/0", "tone 0"))
    merged = merge(first, second, out=tmp_path / "merged")
    assert [label.mid for label in read_manifest(merged).vocabulary.classes] == ["/t/0", "/t/1", "/new"]
    assert {clip_id: labels for clip_id, (labels, _, _) in contents(merged).items()} == {
        "clip0": ["/t/0"],  # the first's
        "clip1": ["/t/1"],
        "clip2": ["/t/0"],
        "clip3": ["/new"],
    }
    assert "1: its 2 classes become 3 others" in caplog.text
    before = read_manifest(merged).table
    run_index(IndexConfig(str(merged)))
    assert read_manifest(merged).table == before


def test_class_lists_that_contradict_each_other_are_refused_unless_one_is_given(make_dataset, tmp_path: Path) -> None:
    first, second = make_dataset(tmp_path / "1", clips=2, classes=2), make_dataset(tmp_path / "2", clips=4, classes=2)
    classes(second, ("/other", "tone 0"), ("/unknown", "not there"))
    with pytest.raises(UsageError, match=r"2: its class 'tone 0' is '/other', but '/t/0' in an earlier dataset"):
        merge(first, second, out=tmp_path / "merged")
    merged = merge(first, second, out=tmp_path / "merged", classes=first / "classes.csv")
    assert contents(merged)["clip2"][0] == ["/t/0"]  # by its name
    assert ("clip3", "unknown label") in rejected(merged)


def test_changed_bytes_are_left_out_and_counted(dataset: Path, tmp_path: Path) -> None:
    source = reshard(dataset, tmp_path / "sound")
    manifest = read_manifest(source)
    with (source / manifest.shards[0]).open("r+b") as stream:
        stream.seek(int(manifest.offsets[1]) + 9)
        stream.write(b"rot")
    copy = reshard(source, tmp_path / "copy")
    assert rejected(copy) == [("clip1", "other bytes than the manifest's")]
    assert contents(copy).keys() == {f"clip{number}" for number in range(24)} - {"clip1"}


def test_a_missing_shard_ends_the_copy_before_it_begins(dataset: Path, tmp_path: Path) -> None:
    (dataset / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"1 shards .* are missing, such as train-000001\.tar"):
        reshard(dataset, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"eval_share": 0.0}, "--eval-share is 0.0"),
        ({"eval_share": 1.0}, "--eval-share is 1.0"),
        ({"eval": "OUT/train/"}, "choose two folders"),
        ({"train": "OUT/../all"}, "is the dataset itself"),
        ({"copies": CopyConfig(clips_per_shard=0)}, "--clips-per-shard is 0"),
        ({"eval_share": 1e-9}, "none of the 24 clips"),
    ],
)
def test_a_split_that_cannot_be_is_wrong_usage(dataset: Path, tmp_path: Path, settings: dict, complaint: str) -> None:
    out = tmp_path / "out"
    options: dict = {"dataset": str(dataset), "eval_share": 0.3, "train": f"{out}/train", "eval": f"{out}/eval"}
    for name, value in settings.items():
        options[name] = value.replace("OUT", str(out)) if isinstance(value, str) else value
    with pytest.raises(UsageError, match=complaint):
        split_dataset.run(split_dataset.SplitConfig(**options))


def test_a_dataset_is_not_copied_onto_itself(dataset: Path, tmp_path: Path) -> None:
    before = files(dataset)
    with pytest.raises(UsageError, match="is the dataset itself"):
        reshard(dataset, tmp_path / "x" / ".." / "all")
    with pytest.raises(UsageError, match="is one of the datasets"):
        merge(dataset, out=dataset)
    with pytest.raises(ManifestError, match="there is no such folder"):
        merge(tmp_path / "nothing", out=tmp_path / "merged")
    assert files(dataset) == before


def test_a_copy_may_go_to_a_url(dataset: Path) -> None:
    out = "memory://copies/resharded"
    reshard_dataset.run(reshard_dataset.ReshardConfig(str(dataset), out=out, copies=SMALL))
    assert read_manifest(out).clip_ids == read_manifest(dataset).clip_ids


@pytest.mark.ray
def test_a_cluster_makes_the_same_copy(dataset: Path, tmp_path: Path, shared_ray: None) -> None:
    here = reshard(dataset, tmp_path / "a" / "out")
    there = reshard(dataset, tmp_path / "b" / "out", CopyConfig(clips_per_shard=4, address="auto"))
    assert files(there) == files(here)
