from pathlib import Path

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.clip_ids import is_safe_name
from pipeline.dataset.manifest import (
    CLASSES_NAME,
    MANIFEST_NAME,
    SCHEMA,
    Manifest,
    read_manifest,
    write_manifest,
)
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import ManifestError

ROWS = {
    "clip_id": ["--a", "_b", "c", "d"],
    "shard": ["train-0.tar", "train-1.tar", "train-0.tar", "train-1.tar"],
    "offset": [512, 512, 2048, 4096],
    "size": [100, 200, 300, 400],
    "format": ["flac", "mp3", "flac", "wav"],
    "labels": [[0, 2], [], [1], [2]],
    "crc32": [1, 2**32 - 1, None, 4],
}


def table(**changes: list) -> pa.Table:
    columns = {**ROWS, **changes}
    return pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()})


@pytest.fixture
def three_classes() -> Vocabulary:
    return Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(3)))


@pytest.fixture
def dataset(tmp_path: Path, three_classes: Vocabulary) -> Path:
    write_manifest(tmp_path, table(), three_classes)
    return tmp_path


def replace(dataset: Path, columns: pa.Table) -> None:
    """Put other columns behind the same vocabulary hash, as somebody else's program might."""
    metadata = pq.read_schema(dataset / MANIFEST_NAME).metadata
    pq.write_table(columns.replace_schema_metadata(metadata), dataset / MANIFEST_NAME)


def test_rows_come_back_as_columns(dataset: Path, three_classes: Vocabulary) -> None:
    manifest = read_manifest(dataset)
    assert len(manifest) == 4
    assert manifest.location == str(dataset)
    assert manifest.vocabulary == three_classes
    assert manifest.clip_ids.to_pylist() == ROWS["clip_id"]
    assert [manifest.shards[shard] for shard in manifest.shard_of_clip] == ROWS["shard"]
    assert manifest.offsets.tolist() == ROWS["offset"]
    assert manifest.sizes.tolist() == ROWS["size"]
    assert manifest.formats.to_pylist() == ROWS["format"]
    assert manifest.crc32s.tolist() == [1, 2**32 - 1, -1, 4]
    assert (manifest.shard_of_clip.dtype, manifest.offsets.dtype) == (np.int32, np.int64)


def test_labels_come_as_a_multi_hot_matrix_of_any_rows(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    rows = np.array([3, 0, 1, 0])
    assert manifest.label_matrix(rows).tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert manifest.label_matrix(np.array([], dtype=np.int64)).shape == (0, 3)
    assert manifest.label_counts().tolist() == [1, 1, 2]
    assert [manifest.label_counts(np.array([row])).tolist() for row in (0, 1)] == [[1, 0, 1], [0, 0, 0]]
    indptr, indices = manifest.labels_csr
    assert (indptr.tolist(), indices.tolist()) == ([0, 2, 2, 3, 4], [0, 2, 1, 2])


def test_a_column_of_an_earlier_version_is_read_and_written_under_its_present_name(
    dataset: Path, three_classes: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    mask = pa.array([[0, 1], None, [], [2]], pa.list_(pa.int16()))
    present = Manifest("here", table().append_column("label_mask", mask), three_classes)
    replace(dataset, table().append_column("judged", mask))
    caplog.set_level("INFO", "pipeline")
    earlier = read_manifest(dataset)
    assert [record.getMessage() for record in caplog.records] == [
        f"{dataset}/{MANIFEST_NAME}: its column judged is read as label_mask, as it is called now"
    ]
    found = earlier.label_mask(np.arange(4))
    assert found is not None
    assert found.tolist() == [[True, True, False], [True] * 3, [False] * 3, [False, False, True]]
    assert earlier.identity == present.identity, "runs and stores of before go on"
    write_manifest(dataset, earlier.table, three_classes)
    assert pq.read_table(dataset / MANIFEST_NAME)["label_mask"].to_pylist() == mask.to_pylist()
    assert "judged" not in pq.read_schema(dataset / MANIFEST_NAME).names


def test_where_a_column_has_both_names_the_present_one_counts(dataset: Path) -> None:
    mask = pa.array([[0], [1], [2], []], pa.list_(pa.int16()))
    both = table().append_column("label_mask", mask).append_column("judged", pa.array(["a", "b", "c", "d"]))
    for columns in (both, both.select(both.column_names[::-1])):
        replace(dataset, columns)
        assert read_manifest(dataset).table["label_mask"].to_pylist() == mask.to_pylist()


def test_a_shard_knows_its_rows(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert manifest.rows_of_shard("train-0.tar").tolist() == [0, 2]
    assert manifest.rows_of_shard("train-1.tar").tolist() == [1, 3]
    with pytest.raises(KeyError):
        manifest.rows_of_shard("train-2.tar")


def test_a_shards_identity_follows_its_clips_and_bytes_only(three_classes: Vocabulary) -> None:
    manifest = Manifest("here", table(), three_classes)
    relabelled = Manifest("there", table(labels=[[1], [1], [1], [1]], offset=[0, 0, 1, 1]), three_classes)
    assert manifest.shard_identity("train-0.tar") == relabelled.shard_identity("train-0.tar")
    assert manifest.shard_identity("train-0.tar") != manifest.shard_identity("train-1.tar")
    for change in ({"clip_id": ["--b", "_b", "c", "d"]}, {"size": [101, 200, 300, 400]}, {"crc32": [2, 2, None, 4]}):
        changed = Manifest("here", table(**change), three_classes)
        assert manifest.shard_identity("train-0.tar") != changed.shard_identity("train-0.tar")


def test_the_identity_follows_ids_labels_and_classes(three_classes: Vocabulary) -> None:
    identity = Manifest("here", table(), three_classes).identity
    assert identity == Manifest("there", table(offset=[0, 1, 2, 3]), three_classes).identity
    # Ids that read the same when they are joined are still other ids.
    assert identity != Manifest("here", table(clip_id=["--a_", "b", "c", "d"]), three_classes).identity
    assert identity != Manifest("here", table(labels=[[0], [2], [1], [2]]), three_classes).identity
    more = Vocabulary((*three_classes.classes, LabelClass(3, "/m/3", "Sound 3")))
    assert identity != Manifest("here", table(), more).identity


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, three_classes: Vocabulary) -> None:
    for name in ("one", "two"):
        write_manifest(tmp_path / name, table(), three_classes)
    assert (tmp_path / "one" / MANIFEST_NAME).read_bytes() == (tmp_path / "two" / MANIFEST_NAME).read_bytes()


def test_a_manifest_rewritten_by_polars_is_read(dataset: Path) -> None:
    metadata = pq.read_schema(dataset / MANIFEST_NAME).metadata
    frame = polars.read_parquet(dataset / MANIFEST_NAME).with_columns(
        polars.col("labels").cast(polars.List(polars.Int64))
    )
    pq.write_table(frame.to_arrow().replace_schema_metadata(metadata), dataset / MANIFEST_NAME)
    assert read_manifest(dataset).table.equals(Manifest(str(dataset), table(), read_manifest(dataset).vocabulary).table)


def test_columns_that_may_be_absent_may_be_absent(dataset: Path) -> None:
    replace(dataset, table().drop_columns(["crc32"]))
    assert read_manifest(dataset).crc32s.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"clip_id": ["a", "b", "c", "a"]},
            r"1 rows of the manifest have the clip_id of an earlier row.*row 3, clip a",
        ),
        ({"clip_id": ["a", "", "c", "d"]}, "an empty clip_id"),
        ({"clip_id": ["a", None, "c", "d"]}, "column clip_id has 1 nulls"),
        ({"offset": [0, 1, -1, 2]}, "a negative offset.*row 2"),
        ({"size": [0, 1, -1, 2]}, "a size outside 0 to"),
        ({"size": [0, 1, 2**40, 2]}, "a size outside 0 to"),
        ({"labels": [[0], [3], [], [1]]}, "a label outside 0 to 2.*row 1"),
        ({"labels": [[], [], [], [-1]]}, "a label outside 0 to 2.*row 3"),
        ({"labels": [[], None, [], []]}, "column labels has 1 nulls"),
        ({"labels": [[], [None], [], []]}, "column labels has 1 nulls"),
        ({"shard": ["a", "../b", "c", "d"]}, r"names a shard outside its folder: '\.\./b'"),
        ({"shard": ["a", "/etc/passwd", "c", "d"]}, "names a shard outside its folder"),
    ],
)
def test_values_that_contradict_themselves_are_refused(dataset: Path, changes: dict, complaint: str) -> None:
    replace(dataset, table(**changes))
    with pytest.raises(ManifestError, match=complaint):
        read_manifest(dataset)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("clip_id", pa.array([1, 2, 3, 4]), "column clip_id is int64, expected string"),
        ("offset", pa.array(["1", "2", "3", "4"]), "column offset is string, expected int64"),
        ("offset", pa.array([1.0, 2.0, 3.0, 4.0]), "column offset is double"),
        ("labels", pa.array(["a", "b", "c", "d"]), "column labels is string"),
        ("labels", pa.array([[70_000], [], [], []]), "column labels is list"),
        ("shard", pa.array([b"a", b"b", b"c", b"d"]), "column shard is"),
    ],
)
def test_a_column_of_another_kind_is_refused(dataset: Path, name: str, values: pa.Array, complaint: str) -> None:
    columns = table()
    replace(dataset, columns.set_column(columns.column_names.index(name), name, values))
    with pytest.raises(ManifestError, match=complaint):
        read_manifest(dataset)


def test_a_missing_column_is_named(dataset: Path) -> None:
    replace(dataset, table().drop_columns(["size"]))
    with pytest.raises(ManifestError, match="has no column size"):
        read_manifest(dataset)


def test_other_classes_than_the_manifests_are_refused(dataset: Path) -> None:
    (dataset / CLASSES_NAME).write_text('index,mid,display_name\n0,/m/0,"Other"\n')
    with pytest.raises(ManifestError, match=r"made with classes .* hashes to .*pipeline index"):
        read_manifest(dataset)


def test_missing_files_say_what_makes_them(dataset: Path, tmp_path: Path) -> None:
    (dataset / CLASSES_NAME).unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"has no classes\.csv"):
        read_manifest(dataset)
    with pytest.raises(ManifestError, match=r"has no manifest\.parquet. Run `pipeline index"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(ManifestError, match="absent: there is no such folder"):
        read_manifest(tmp_path / "absent")


def test_a_file_that_is_no_parquet_is_refused(dataset: Path) -> None:
    whole = (dataset / MANIFEST_NAME).read_bytes()
    for content in (b"", b"PAR1 nonsense PAR1", whole[: len(whole) // 2], whole[:200] + b"\xff" * 40 + whole[240:]):
        (dataset / MANIFEST_NAME).write_bytes(content)
        with pytest.raises(ManifestError):
            read_manifest(dataset)


def test_rows_that_contradict_themselves_are_not_written(tmp_path: Path, three_classes: Vocabulary) -> None:
    with pytest.raises(ManifestError):
        write_manifest(tmp_path, table(clip_id=["a", "a", "a", "a"]), three_classes)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_may_lie_behind_a_url(three_classes: Vocabulary) -> None:
    write_manifest("memory://datasets/one", table(), three_classes)
    assert read_manifest("memory://datasets/one").clip_ids.to_pylist() == ROWS["clip_id"]


def test_safe_names_stay_in_their_folder() -> None:
    assert all(is_safe_name(name) for name in ("a.tar", "-a.tar", "sub/a.tar", "10:30.wav", "..a", "音.flac"))
    assert not any(is_safe_name(name) for name in ("", "/a.tar", "../a.tar", "a/../b", "a\nb", "a\0b"))


def test_a_class_is_known_in_the_clips_that_do_not_leave_it_out(tmp_path: Path, three_classes: Vocabulary) -> None:
    everything = write_manifest(tmp_path / "all", table(), three_classes)
    assert everything.known_counts().tolist() == [4, 4, 4]
    partly = write_manifest(tmp_path / "some", table(label_mask=[[0, 2], None, [1], []]), three_classes)
    assert partly.known_counts().tolist() == [2, 2, 2]
