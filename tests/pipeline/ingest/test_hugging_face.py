import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_copies import RealClip, write_hugging_face_parquet

from pipeline.commands.ingest_huggingface import IngestHuggingfaceConfig, run
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary, audioset_vocabulary
from pipeline.errors import DecodeError, ManifestError, UsageError
from pipeline.ingest.hugging_face import HuggingFaceSource
from pipeline.ingest.sources import PlannedClip


def ingest(tmp_path: Path, *paths: Path | str, **settings: object):
    options: dict = {"out": str(tmp_path / "train"), "clips_per_shard": 3} | settings
    return run(IngestHuggingfaceConfig(parquet=tuple(map(str, paths)), **options))


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


def write_rows(path: Path, clips: list[RealClip], names: Sequence[str | None], features: dict | None = None, **columns):
    """As `push_to_hub` writes a data set of one's own: sounds under the ends of their paths, and any other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sounds = [{"bytes": clip.audio, "path": name} for clip, name in zip(clips, names, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"audio": pa.array(sounds, kind), **columns})
    if features is not None:
        told = {"info": {"features": {"audio": {"_type": "Audio"}, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, path)
    return path


def labels_by_scan(path: Path, vocabulary: Vocabulary, *, numbered: bool = False) -> list[tuple[int, ...]]:
    items = HuggingFaceSource((str(path),), numbered=numbered).scan(vocabulary, Counter())
    return [item.labels for item in items if isinstance(item, PlannedClip)]


def labelled(dataset: Path) -> list[list[str]]:
    """Give the names of each clip's classes, in the order of the clips."""
    manifest = read_manifest(dataset)
    return [[manifest.vocabulary.names[index] for index in labels] for labels in manifest.table["labels"].to_pylist()]


NAMES = ["0.mp3", "1.mp3", "2.mp3", "3.mp3"]
CLASS_LABEL = {"_type": "ClassLabel", "names": ["rain", "dog_bark", "chainsaw"]}


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        (CLASS_LABEL, [2, 0, 1, 2]),
        ({"_type": "ClassLabel", "names": {"1": "dog_bark", "0": "rain", "2": "chainsaw"}}, [2, 0, 1, 2]),
        ({"_type": "Sequence", "feature": CLASS_LABEL}, [[2], [0], [1], [2]]),
        ({"_type": "List", "feature": CLASS_LABEL}, [[2], [0], [1], [2]]),
        ([CLASS_LABEL], [[2], [0], [1], [2]]),
    ],
)
def test_numbers_mean_the_names_that_their_column_has(
    tmp_path: Path, mp3s: list[RealClip], feature: dict, labels: list
) -> None:
    ingest(tmp_path, write_rows(tmp_path / "own.parquet", mp3s, NAMES, {"label": feature}, label=labels))
    assert read_manifest(tmp_path / "train").vocabulary.names == ("rain", "dog_bark", "chainsaw")
    assert labelled(tmp_path / "train") == [["chainsaw"], ["rain"], ["dog_bark"], ["chainsaw"]]


def test_each_file_has_names_of_its_own(tmp_path: Path, mp3s: list[RealClip]) -> None:
    other = {"_type": "ClassLabel", "names": ["owl", "rain"]}
    first = write_rows(tmp_path / "a.parquet", mp3s[:2], NAMES[:2], {"label": CLASS_LABEL}, label=[0, 1])
    second = write_rows(tmp_path / "b.parquet", mp3s[2:], NAMES[2:], {"label": other}, label=[0, 1])
    ingest(tmp_path, first, second)
    assert read_manifest(tmp_path / "train").vocabulary.names == ("rain", "dog_bark", "chainsaw", "owl")
    assert labelled(tmp_path / "train") == [["rain"], ["dog_bark"], ["owl"], ["rain"]]


def test_names_of_audiosets_classes_are_audiosets_classes(tmp_path: Path, mp3s: list[RealClip]) -> None:
    vocabulary = audioset_vocabulary()
    backwards = {"_type": "ClassLabel", "names": list(vocabulary.names)[::-1]}
    path = write_rows(tmp_path / "a.parquet", mp3s, NAMES, {"label": backwards}, label=[0, 526, 525, 389])
    ingest(tmp_path, path)
    assert read_manifest(tmp_path / "train").vocabulary == vocabulary
    assert read_manifest(tmp_path / "train").table["labels"].to_pylist() == [[526], [0], [1], [137]]


def test_a_class_list_that_the_user_names_takes_the_names_in_its_order(
    tmp_path: Path, mp3s: list[RealClip], rejected
) -> None:
    own = tmp_path / "own.csv"
    own.write_text("index,mid,display_name\n0,/m/dog,dog_bark\n1,rain,Rain\n")
    path = write_rows(tmp_path / "own.parquet", mp3s, NAMES, {"label": CLASS_LABEL}, label=[0, 1, 2, -1])
    ingest(tmp_path, path, classes=str(own))
    assert labelled(tmp_path / "train") == [["Rain"], ["dog_bark"]]
    assert [reason for *_, reason in rejected(tmp_path / "train")] == ["unknown label", "no labels"]


@pytest.mark.parametrize("metadata", [None, {}, {"label": {"_type": "Value", "dtype": "int64"}}, {"label": 3}])
@pytest.mark.parametrize("labels", [[2, 0, 1, 2], [[2, 0], [0], [1], [2]], [2.0, 0.0, 1.0, float("nan")]])
def test_numbers_of_no_list_are_an_error_that_names_the_flag(
    tmp_path: Path, mp3s: list[RealClip], metadata: dict | None, labels: list
) -> None:
    path = write_rows(tmp_path / "own.parquet", mp3s, NAMES, metadata, label=labels)
    own = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(3)))
    with pytest.raises(UsageError, match=r"own\.parquet: its column label holds class numbers.*--classes"):
        labels_by_scan(path, own)
    assert labels_by_scan(path, own, numbered=True)[1:3] == [(0,), (1,)]


def test_numbers_beside_names_are_of_no_matter_without_their_list(tmp_path: Path, mp3s: list[RealClip]) -> None:
    columns = {"label": [["Speech"], ["Music"], ["Speech"], ["Music"]], "label_id": [[7], [4], [7], [4]]}
    ingest(tmp_path, write_rows(tmp_path / "own.parquet", mp3s, NAMES, **columns))
    assert labelled(tmp_path / "train") == [["Speech"], ["Music"], ["Speech"], ["Music"]]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint8(), pa.float32(), pa.bool_()])
@pytest.mark.parametrize("fixed", [False, True])
def test_vectors_with_a_number_for_each_class_are_read_as_such(
    tmp_path: Path, mp3s: list[RealClip], kind: pa.DataType, fixed: bool
) -> None:
    vectors = np.zeros((4, 527), int)
    vectors[[0, 0, 1, 3], [0, 137, 1, 526]] = 1
    column = pa.array(
        [pa.array(vector.tolist()).cast(kind).to_pylist() for vector in vectors], pa.list_(kind, 527 if fixed else -1)
    )
    path = write_rows(tmp_path / "own.parquet", mp3s, NAMES, labels=column)
    assert labels_by_scan(path, audioset_vocabulary()) == [(0, 137), (1,), (), (526,)]


def test_vectors_of_another_length_are_left_out(tmp_path: Path, mp3s: list[RealClip]) -> None:
    path = write_rows(tmp_path / "own.parquet", mp3s, NAMES, labels=[[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    with pytest.raises(ManifestError, match="4 label vector of another length"):
        ingest(tmp_path, path)


def ids_of(dataset: Path) -> list[str]:
    return read_manifest(dataset).clip_ids.to_pylist()


@pytest.mark.parametrize("names", [[None] * 4, ["0.mp3", "1.mp3", "0.mp3", "1.mp3"], NAMES])
def test_rows_without_an_id_are_all_kept_under_ids_that_no_other_file_has(
    tmp_path: Path, mp3s: list[RealClip], names: list[str | None]
) -> None:
    features, labels = {"label": CLASS_LABEL}, [0, 1, 2, 0]
    train = write_rows(tmp_path / "train" / "0000.parquet", mp3s, names, features, label=labels)
    test = write_rows(tmp_path / "test" / "0000.parquet", mp3s[::-1], names, features, label=labels)
    assert ingest(tmp_path, train, test, out=str(tmp_path / "both")).rejected == {}
    both = ids_of(tmp_path / "both")
    assert len(set(both)) == 8
    ingest(tmp_path, train, out=str(tmp_path / "one"))
    (tmp_path / "elsewhere").mkdir()
    ingest(tmp_path, train.rename(tmp_path / "elsewhere" / train.name), out=str(tmp_path / "moved"))
    assert ids_of(tmp_path / "one") == ids_of(tmp_path / "moved") == both[:4]
    assert all(clip_id.startswith("0000-") for clip_id in both)


def test_a_column_of_ids_can_be_named(tmp_path: Path, mp3s: list[RealClip], rejected) -> None:
    path = write_rows(tmp_path / "a.parquet", mp3s, NAMES, label=["Speech"] * 4, file=["x.wav", "y.wav", None, "x.wav"])
    ingest(tmp_path, path, id_column="file")
    first, second, third = ids_of(tmp_path / "train")
    assert (first, second) == ("x.wav", "y.wav")
    assert third.startswith("a-")
    assert [(clip_id, reason) for clip_id, _, reason in rejected(tmp_path / "train")] == [("x.wav", "repeated clip id")]
    with pytest.raises(UsageError, match=r"a\.parquet: has no column id; it has audio, label, file"):
        ingest(tmp_path, path, id_column="id", overwrite=True)
    numbers = write_rows(tmp_path / "b.parquet", mp3s, NAMES, label=["Speech"] * 4, number=[7, 8, 9, 10])
    ingest(tmp_path, numbers, id_column="number", overwrite=True)
    assert ids_of(tmp_path / "train") == ["7", "8", "9", "10"]


def test_a_row_whose_text_is_no_utf8_costs_itself_alone(tmp_path: Path, mp3s: list[RealClip], rejected) -> None:
    paths = pa.array([b"a.mp3", b"caf\xe9.mp3", b"c.mp3", b"d.mp3"], pa.binary()).view(pa.string())
    sounds = pa.StructArray.from_arrays([pa.array([clip.audio for clip in mp3s]), paths], ["bytes", "path"])
    path = tmp_path / "latin.parquet"
    pq.write_table(pa.table({"audio": sounds, "label": ["Speech"] * 4}), path)
    assert ingest(tmp_path, path).clips == 3
    assert rejected(tmp_path / "train") == [(None, f"{path}/row 1", "name not in UTF-8")]
