import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp, draw_view
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import LogitStoreError
from pipeline.logits.forms import TopLogits, mean_of_members
from pipeline.logits.stamp import ImportStamp, SourceFile, StoreStamp, TeacherStamp
from pipeline.logits.store import (
    FAILED_NAME,
    STORE_NAME,
    ClipFailure,
    finished_parts,
    list_parts,
    open_store,
    part_stem,
    publish_part,
    read_stamp,
    write_failures,
    write_stamp,
)

CLASSES = 5
VOCABULARY = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(CLASSES)))
STAMP = StoreStamp(
    teachers=(TeacherStamp(name="passt_tiny", weight=1.0, sha256="a" * 64, front_end="mel"),),
    vocabulary_sha256=VOCABULARY.sha256,
    classes=CLASSES,
    precision="float32",
)
OTHER = replace(STAMP, precision="bfloat16")


def logits_of(clip_ids: list[str]) -> np.ndarray:
    """(clips, classes), a number for each id and class."""
    seeds = [sum(map(ord, clip_id)) for clip_id in clip_ids]
    return (np.array(seeds).reshape(-1, 1) / 8 - np.arange(CLASSES)).astype(np.float16)


TEACHERS = (*STAMP.teachers, TeacherStamp(name="ast_tiny", weight=3.0, sha256="b" * 64, front_end="fbank"))
WITH_MEMBERS = replace(STAMP, teachers=TEACHERS, members="float16")
TOP = replace(STAMP, top_k=2)
WITH_VIEWS = replace(STAMP, views=ViewsStamp(count=3, config=ViewConfig(seed=5)))
IMPORTED = replace(
    STAMP,
    teachers=(),
    precision="unknown",
    imported=ImportStamp(
        layout="efficientat-npy",
        files=(SourceFile(name="passt_ensemble.npy", size=12, sha256="d" * 64),),
        origin="EfficientAT's release, an ensemble of nine PaSSTs",
        held="logits",
    ),
)


def publish(store: Path, stem: str, clip_ids: list[str], stamp: StoreStamp = STAMP, **kwargs: object) -> None:
    publish_part(str(store), stem, clip_ids, logits_of(clip_ids), stamp, f"identity of {stem}", **kwargs)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    write_stamp(str(folder), STAMP)
    publish(folder, "a", ["-x", "_y"])
    publish(folder, "b", ["z"], failures=[ClipFailure(clip_id="bad", reason="not audio", detail="an essay")])
    return folder


def manifest_of(folder: Path, clip_ids: list[str], vocabulary: Vocabulary = VOCABULARY) -> Manifest:
    rows = [
        {"clip_id": clip_id, "shard": "a.tar", "offset": 512 * row, "size": 1, "format": "wav", "labels": [0]}
        for row, clip_id in enumerate(clip_ids)
    ]
    write_manifest(str(folder), pa.Table.from_pylist(rows, schema=SCHEMA), vocabulary)
    return read_manifest(str(folder))


# Parts.


def test_part_holds_ids_and_native_half_floats_in_order(store: Path) -> None:
    table = pq.read_table(store / "a.parquet")
    assert table.schema.field("clip_id").type == pa.string()
    logits = table.schema.field("logits").type
    assert pa.types.is_fixed_size_list(logits)
    assert (logits.list_size, logits.value_type) == (CLASSES, pa.float16())
    assert table["clip_id"].to_pylist() == ["-x", "_y"]
    np.testing.assert_array_equal(np.array(table["logits"].to_pylist()), logits_of(["-x", "_y"]))
    assert pq.read_metadata(store / "a.parquet").row_group(0).column(1).compression == "ZSTD"


def test_duckdb_reads_the_store(store: Path) -> None:
    rows = duckdb.connect().execute(f"select clip_id, logits from '{store}/[ab].parquet' order by clip_id").fetchall()
    expected = logits_of(["-x", "_y", "z"])
    assert [(clip_id, list(logits)) for clip_id, logits in rows] == list(
        zip(["-x", "_y", "z"], expected.tolist(), strict=True)
    )


def test_polars_reads_the_store(store: Path) -> None:
    frame = pl.read_parquet(f"{store}/[ab].parquet")
    assert frame["clip_id"].to_list() == ["-x", "_y", "z"]
    np.testing.assert_array_equal(frame["logits"].to_numpy(), logits_of(["-x", "_y", "z"]))


def test_same_content_gives_the_same_bytes(store: Path, tmp_path: Path) -> None:
    publish(tmp_path, "a", ["-x", "_y"])
    assert (tmp_path / "a.parquet").read_bytes() == (store / "a.parquet").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_logits_that_float16_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    logits = np.full((1, CLASSES), value, np.float32)
    with pytest.raises(ValueError, match="not finite"), np.errstate(over="ignore"):
        publish_part(str(tmp_path), "a", ["x"], logits, STAMP, "")
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 clips of 5 classes"):
        publish_part(str(tmp_path), "a", ["x", "y"], logits_of(["x"]), STAMP, "")


def test_shard_without_a_good_clip_is_an_empty_part(tmp_path: Path) -> None:
    write_stamp(str(tmp_path), STAMP)
    publish(tmp_path, "a", [], failures=[ClipFailure(clip_id="x", reason="not audio")])
    opened = open_store(str(tmp_path))
    assert opened.clip_count == 0
    assert opened.part_logits(opened.parts[0]).shape == (0, CLASSES)


def test_part_is_named_after_its_shard() -> None:
    assert part_stem("train-000000.tar") == "train-000000"
    assert part_stem("part.of.many.tar") == "part.of.many"


# What is finished, and what failed.


def test_finished_parts_are_those_that_the_stamp_made(store: Path) -> None:
    publish(store, "c", ["c"], stamp=OTHER)
    found = finished_parts(str(store), STAMP)
    assert {stem: part.shard_identity for stem, part in found.items()} == {"a": "identity of a", "b": "identity of b"}


def test_damaged_part_counts_as_missing_and_is_told(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    (store / "a.parquet").write_bytes((store / "a.parquet").read_bytes()[:-10])
    assert finished_parts(str(store), STAMP).keys() == {"b"}
    assert "a.parquet: damaged" in caplog.text


def test_failures_of_all_parts_are_gathered(store: Path) -> None:
    write_failures(str(store), list_parts(str(store)))
    assert pq.read_table(store / FAILED_NAME).to_pylist() == [
        {"part": "b", "clip_id": "bad", "reason": "not audio", "detail": "an essay"}
    ]
    assert open_store(str(store)).clip_count == 3, "the list of failures is no part"


# Opening.


def test_stamp_comes_back_from_the_store(store: Path, tmp_path: Path) -> None:
    assert read_stamp(str(store)) == STAMP
    assert read_stamp(str(tmp_path / "elsewhere")) is None


def test_folder_without_a_stamp_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(LogitStoreError, match=r"no store\.json.*Make one with"):
        open_store(str(tmp_path))


def test_probabilities_are_refused(tmp_path: Path) -> None:
    write_stamp(str(tmp_path), replace(STAMP, values="probabilities"))
    with pytest.raises(LogitStoreError, match="holds probabilities"):
        open_store(str(tmp_path))


def test_parts_made_differently_are_refused_with_the_difference(store: Path) -> None:
    publish(store, "c", ["c"], stamp=OTHER)
    with pytest.raises(LogitStoreError, match=r"c\.parquet: made otherwise.*precision is bfloat16, not float32"):
        open_store(str(store))


def test_foreign_parquet_is_refused(store: Path) -> None:
    pq.write_table(pa.table({"clip_id": ["a"]}), store / "mine.parquet")
    with pytest.raises(LogitStoreError, match=r"mine\.parquet: not a part of a logit store"):
        open_store(str(store))


def test_part_with_other_columns_than_its_stamp_says_is_refused(store: Path) -> None:
    table = pq.read_table(store / "a.parquet")
    wider = pa.array([[1.0] * 6] * 2, pa.list_(pa.float16(), 6))
    pq.write_table(
        pa.table({"clip_id": table["clip_id"], "logits": wider}).replace_schema_metadata(table.schema.metadata),
        store / "a.parquet",
    )
    with pytest.raises(LogitStoreError, match=r"a\.parquet: its columns are not those of a logit part of 5 classes"):
        open_store(str(store))


# Aligning with a manifest.


def test_logits_stand_in_manifest_order_and_absence_is_told(store: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "data", ["z", "without", "-x"])
    aligned = open_store(str(store)).align(manifest, tmp_path / "cache")
    assert aligned.has_logits.tolist() == [True, False, True]
    np.testing.assert_array_equal(aligned.logits[aligned.has_logits], logits_of(["z", "-x"]))
    assert not aligned.logits[1].any()
    assert aligned.logits.dtype == np.float16


def test_many_parts_are_aligned_whatever_is_read_ahead(store: Path, tmp_path: Path) -> None:
    ids = [f"{stem}-{number}" for stem in "cdefghijkl" for number in range(3)]
    for stem in "cdefghijkl":
        publish(store, stem, [clip_id for clip_id in ids if clip_id.startswith(stem)])
    manifest = manifest_of(tmp_path / "data", ids[::-1])
    aligned = open_store(str(store)).align(manifest, tmp_path / "cache")
    assert aligned.has_logits.all()
    np.testing.assert_array_equal(aligned.logits, logits_of(ids[::-1]))


def test_second_alignment_reads_no_part(store: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "data", ["z"])
    opened = open_store(str(store))
    first = opened.align(manifest, tmp_path / "cache")
    for part in store.glob("*.parquet"):
        part.unlink()
    again = opened.align(manifest, tmp_path / "cache")
    np.testing.assert_array_equal(first.logits, again.logits)


def test_changed_part_is_aligned_anew(store: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "data", ["z", "new"])
    assert open_store(str(store)).align(manifest, tmp_path / "cache").has_logits.tolist() == [True, False]
    publish(store, "b", ["z", "new"])
    assert open_store(str(store)).align(manifest, tmp_path / "cache").has_logits.tolist() == [True, True]


def test_first_part_wins_where_two_hold_a_clip(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish_part(str(store), "c", ["z"], np.full((1, CLASSES), 7, np.float16), STAMP, "")
    manifest = manifest_of(tmp_path / "data", ["z"])
    aligned = open_store(str(store)).align(manifest, tmp_path / "cache")
    np.testing.assert_array_equal(aligned.logits, logits_of(["z"]))
    assert aligned.repeated == 1
    assert "1 clips are in several parts" in caplog.text


def test_dataset_with_other_classes_is_refused(store: Path, tmp_path: Path) -> None:
    renamed = Vocabulary((*VOCABULARY.classes[:-1], LabelClass(4, "/m/4", "Renamed")))
    manifest = manifest_of(tmp_path / "data", ["z"], renamed)
    with pytest.raises(LogitStoreError, match=rf"hash {VOCABULARY.sha256[:12]}.*hash {renamed.sha256[:12]}"):
        open_store(str(store)).align(manifest, tmp_path / "cache")


def test_store_of_another_dataset_is_refused(store: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "data", ["p", "q"])
    with pytest.raises(LogitStoreError, match="3 clips, but none of the 2 clips"):
        open_store(str(store)).align(manifest, tmp_path / "cache")


# Other forms than one whole row a clip.


def new_store(folder: Path, stamp: StoreStamp) -> str:
    write_stamp(str(folder), stamp)
    return str(folder)


def three_views(clip_ids: list[str]) -> np.ndarray:
    """(clips x views, classes): view v of a clip has its logits less v."""
    return (logits_of(clip_ids)[:, None] - np.arange(3)[:, None]).reshape(-1, CLASSES).astype(np.float16)


def test_plain_store_of_an_older_version_is_read_and_plain_stamps_are_as_they_were(store: Path) -> None:
    old = {
        "values": "logits",
        "teachers": [{"name": "passt_tiny", "weight": 1.0, "sha256": "a" * 64, "front_end": "mel"}],
        "vocabulary_sha256": VOCABULARY.sha256,
        "classes": CLASSES,
        "precision": "float32",
    }
    assert json.loads((store / STORE_NAME).read_bytes()) == old
    (store / STORE_NAME).write_text(json.dumps(old, indent=2) + "\n")
    assert open_store(str(store)).clip_count == 3


def test_members_stand_beside_their_mean_in_any_reader(tmp_path: Path) -> None:
    folder, ids = new_store(tmp_path / "store", WITH_MEMBERS), ["-x", "_y"]
    members = np.stack([logits_of(ids), -logits_of(ids)])  # (teachers, rows, classes)
    mean = mean_of_members(members, WITH_MEMBERS.weights)
    publish_part(folder, "a", ids, mean, WITH_MEMBERS, "", members=members)
    opened = open_store(folder)
    np.testing.assert_array_equal(opened.part_members(opened.parts[0]), members)
    np.testing.assert_array_equal(opened.part_logits(opened.parts[0]), mean)
    query = f"SELECT clip_id, logits[1], teacher_1_logits[1], teacher_2_logits[1] FROM '{folder}/a.parquet'"
    assert duckdb.execute(query).fetchall() == [
        (clip_id, mean[row, 0], members[0, row, 0], members[1, row, 0]) for row, clip_id in enumerate(ids)
    ]
    assert pl.read_parquet(f"{folder}/a.parquet")["teacher_2_logits"].to_list() == members[1].tolist()


def test_each_member_aligns_as_a_store_of_its_own(tmp_path: Path) -> None:
    stamp = replace(WITH_MEMBERS, views=WITH_VIEWS.views)
    folder, ids = new_store(tmp_path / "store", stamp), ["-x", "_y"]
    members = np.stack([three_views(ids), -three_views(ids)])  # (teachers, rows, classes)
    publish_part(folder, "a", ids, mean_of_members(members, stamp.weights), stamp, "", members=members)
    opened, manifest = open_store(folder), manifest_of(tmp_path / "data", ["_y", "-x"])
    mean = opened.align(manifest, tmp_path / "cache").logits
    for number, sign in ((1, 1), (2, -1)):
        alone = opened.align(manifest, tmp_path / "cache", member=number).logits
        np.testing.assert_array_equal(alone, sign * logits_of(["_y", "-x"]))
    np.testing.assert_array_equal(mean, -0.5 * logits_of(["_y", "-x"]))


def test_members_that_are_not_kept_are_told(store: Path) -> None:
    opened = open_store(str(store))
    with pytest.raises(LogitStoreError, match="--keep-members"):
        opened.part_members(opened.parts[0])


def test_largest_logits_align_as_whole_ones(tmp_path: Path) -> None:
    folder, ids = new_store(tmp_path / "store", TOP), ["-x", "_y"]
    publish_part(folder, "a", ids, logits_of(ids), TOP, "")
    rows = duckdb.execute(f"SELECT clip_id, top_classes, top_logits, rest_logit FROM '{folder}/a.parquet'").fetchall()
    assert [row[:3] for row in rows] == [(i, [0, 1], list(row[:2])) for i, row in zip(ids, logits_of(ids), strict=True)]
    assert pl.read_parquet(f"{folder}/a.parquet")["top_classes"].to_list() == [[0, 1], [0, 1]]

    aligned = open_store(folder).align(manifest_of(tmp_path / "data", ["_y", "-x"]), tmp_path / "cache").logits
    assert aligned.shape == (2, CLASSES)
    np.testing.assert_array_equal(aligned[:, :2], logits_of(["_y", "-x"])[:, :2])
    np.testing.assert_array_equal(aligned[:, 2:], np.array([[row[3]] * 3 for row in rows[::-1]], np.float16))


def test_largest_logits_from_elsewhere_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = new_store(tmp_path / "store", TOP)
    given = TopLogits(
        classes=np.array([[4, 1]], np.int16),
        logits=np.array([[3.0, -1.0]], np.float16),
        rest=np.array([-9.0], np.float16),
    )
    publish_part(folder, "a", ["x"], given, TOP, "")
    opened = open_store(folder)
    assert opened.part_logits(opened.parts[0]).tolist() == [[-9.0, -1.0, -9.0, -9.0, 3.0]]


def test_class_number_out_of_range_is_refused(tmp_path: Path) -> None:
    folder = new_store(tmp_path / "store", TOP)
    given = TopLogits(
        classes=np.array([[5, 1]], np.int16), logits=np.zeros((1, 2), np.float16), rest=np.zeros(1, np.float16)
    )
    publish_part(folder, "a", ["x"], given, TOP, "")
    opened = open_store(folder)
    with pytest.raises(LogitStoreError, match="top_classes holds 1 to 5"):
        opened.part_logits(opened.parts[0])


def test_each_view_has_a_row_that_says_what_it_is(tmp_path: Path) -> None:
    folder, ids = new_store(tmp_path / "store", WITH_VIEWS), ["-x", "_y"]
    publish_part(folder, "a", ids, three_views(ids), WITH_VIEWS, "")
    assert WITH_VIEWS.views is not None
    drawn = [draw_view(WITH_VIEWS.views.config, clip_id, number) for clip_id in ids for number in range(3)]
    columns = "clip_id, view, view_seed, shift_ms, gain_db, low_rise_hz, high_rise_hz"
    expected = [
        (ids[row // 3], row % 3, one.seed, one.shift_ms, one.gain_db, one.low_rise_hz, one.high_rise_hz)
        for row, one in enumerate(drawn)
    ]
    assert duckdb.execute(f"SELECT {columns} FROM '{folder}/a.parquet'").fetchall() == expected
    assert pl.read_parquet(f"{folder}/a.parquet").select(columns.split(", ")).rows() == expected
    clean = duckdb.execute(f"SELECT logits FROM '{folder}/a.parquet' WHERE view = 0").fetchall()
    assert [row[0] for row in clean] == logits_of(ids).tolist()


def test_views_align_together_or_the_clean_one_alone(tmp_path: Path) -> None:
    folder, ids = new_store(tmp_path / "store", WITH_VIEWS), ["-x", "_y"]
    publish_part(folder, "a", ids, three_views(ids), WITH_VIEWS, "")
    opened, manifest = open_store(folder), manifest_of(tmp_path / "data", ["_y", "-x", "without"])
    assert (opened.clip_count, opened.clip_ids().to_pylist()) == (2, ids)
    clean = opened.align(manifest, tmp_path / "cache")
    together = opened.align(manifest, tmp_path / "cache", all_views=True)
    np.testing.assert_array_equal(clean.logits[:2], logits_of(["_y", "-x"]))
    np.testing.assert_array_equal(together.logits[:2].reshape(-1, CLASSES), three_views(["_y", "-x"]))
    assert together.has_logits.tolist() == clean.has_logits.tolist() == [True, True, False]
    assert not together.logits[2].any()


@pytest.mark.parametrize("column", ["view", "shift_ms", "high_rise_hz"])
def test_views_that_are_not_those_of_the_stamp_are_refused(tmp_path: Path, column: str) -> None:
    folder, ids = new_store(tmp_path / "store", WITH_VIEWS), ["-x", "_y"]
    publish_part(folder, "a", ids, three_views(ids), WITH_VIEWS, "")
    table = pq.read_table(f"{folder}/a.parquet")
    values = table[column].to_pylist()
    values[-1] += 1
    place = table.column_names.index(column)
    changed = table.set_column(place, table.field(column), pa.array(values, pa.int16()))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), f"{folder}/a.parquet")
    opened = open_store(folder)
    with pytest.raises(LogitStoreError, match=r"a\.parquet: its views are not those"):
        opened.part_logits(opened.parts[0])


@pytest.mark.parametrize(
    ("stamp", "column"),
    [(STAMP, "logits"), (TOP, "top_logits"), (TOP, "rest_logit"), (WITH_MEMBERS, "logits"), (WITH_VIEWS, "logits")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_of_another_writer_that_are_no_numbers_are_refused(
    tmp_path: Path, stamp: StoreStamp, column: str, value: float
) -> None:
    store, ids = tmp_path / "store", ["x", "y"]
    write_stamp(str(store), stamp)
    logits = np.repeat(logits_of(ids), stamp.view_count, axis=0)
    members = None if stamp.members is None else np.stack([logits, logits])
    publish_part(str(store), "a", ids, logits, stamp, "a", members=members)
    table = pq.read_table(store / "a.parquet")
    field = table.schema.field(column)
    is_list = pa.types.is_fixed_size_list(field.type)
    values = table[column].combine_chunks()
    numbers = (values.flatten() if is_list else values).to_numpy(zero_copy_only=False).copy()
    numbers[-1] = value  # of the last view of the last clip
    flat = pa.array(numbers)
    changed = pa.FixedSizeListArray.from_arrays(flat, type=field.type) if is_list else flat
    pq.write_table(table.set_column(table.schema.get_field_index(column), field, changed), store / "a.parquet")
    manifest = manifest_of(tmp_path / "d", ids)
    with pytest.raises(
        LogitStoreError, match=r"a\.parquet: the logits of 1 clips are not finite, such as those of y\."
    ):
        open_store(str(store)).align(manifest, tmp_path / "cache", all_views=stamp.views is not None)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_rows_that_are_not_whole_views_are_refused(tmp_path: Path) -> None:
    folder = new_store(tmp_path / "store", WITH_VIEWS)
    publish_part(folder, "a", ["x"], three_views(["x"]), WITH_VIEWS, "")
    table = pq.read_table(f"{folder}/a.parquet")
    pq.write_table(table.slice(0, 2), f"{folder}/a.parquet")
    with pytest.raises(LogitStoreError, match="2 rows are no 3 views of each clip"):
        open_store(folder)


def test_imported_logits_say_where_they_came_from(tmp_path: Path) -> None:
    folder = new_store(tmp_path / "store", IMPORTED)
    publish_part(folder, "a", ["x"], logits_of(["x"]), IMPORTED, "")
    opened = open_store(folder)
    assert opened.stamp == IMPORTED
    assert IMPORTED.imported is not None
    changed = replace(IMPORTED, imported=replace(IMPORTED.imported, held="probabilities"))
    assert changed.differences_from(IMPORTED) == "imported held is probabilities, not logits"


@pytest.mark.parametrize(
    ("stamp", "rows", "members", "complaint"),
    [
        (WITH_VIEWS, 2, None, "1 clips with 3 views of 5 classes"),
        (WITH_MEMBERS, 1, None, "members"),
        (STAMP, 1, np.zeros((1, 1, CLASSES), np.float16), "members"),
        (WITH_MEMBERS, 1, np.full((2, 1, CLASSES), np.nan, np.float16), "members of a are not finite"),
    ],
)
def test_values_that_do_not_fit_the_stamp_are_refused(
    tmp_path: Path, stamp: StoreStamp, rows: int, members: np.ndarray | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        publish_part(str(tmp_path), "a", ["x"], np.zeros((rows, CLASSES)), stamp, "", members=members)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("settings", "complaint"), [({"top_k": 5}, "choose 1 to 4"), ({"top_k": 0}, "choose 1 to 4")])
def test_number_of_largest_logits_out_of_range_is_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(STAMP, **settings)
    with pytest.raises(ValueError, match="leave out top_k"):
        replace(WITH_MEMBERS, top_k=2)


def test_disk_without_room_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """Under a real limit of the operating system, in a process of its own."""
    write_stamp(str(tmp_path), STAMP)
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import STAMP, logits_of
from pipeline.errors import StorageFullError
from pipeline.logits.store import publish_part
ids = [str(number) for number in range(5000)]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    publish_part({str(tmp_path)!r}, "a", ids, logits_of(ids), STAMP, "")
except StorageFullError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "a.parquet: there is no room left to write it" in told
    assert [path.name for path in tmp_path.iterdir()] == [STORE_NAME]


def test_threads_that_align_at_once_agree(store: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "data", ["z", "_y", "-x"])
    opened = open_store(str(store))
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(opened.align(manifest, tmp_path / "cache").logits))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for logits in found:
        np.testing.assert_array_equal(logits, logits_of(["z", "_y", "-x"]))
    assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing half-written stays"


def test_reader_needs_neither_torch_nor_ray() -> None:
    code = "import sys, pipeline.logits.store; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
