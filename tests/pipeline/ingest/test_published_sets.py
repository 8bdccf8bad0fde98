import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published_layouts as layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commands import index_dataset, reshard_dataset
from pipeline.dataset.manifest import MANIFEST_NAME, join_manifests, read_manifest, write_manifest
from pipeline.errors import ManifestError, PipelineError, UsageError
from pipeline.ingest.copying import CopyConfig
from pipeline.ingest.dataset_folder import DatasetFolder, Ledger, publish_ledger
from pipeline.ingest.esc50 import Esc50
from pipeline.ingest.fsd50k import Fsd50k
from pipeline.ingest.ingesting import IngestConfig, ingest
from pipeline.ingest.openmic import OpenMic
from pipeline.ingest.published_sets import PublishedSet
from pipeline.ingest.sources import PlannedClip
from pipeline.ingest.tau_urban import TauUrban
from pipeline.ingest.webdataset import WebdatasetSource
from pipeline.verification.dataset_repair import repair_dataset
from pipeline.verification.datasets import UNUSABLE_MANIFEST
from pipeline.verification.faults import Fault

LAYOUTS: list[tuple[type[PublishedSet], Callable[[Path], Path]]] = [
    (Esc50, layouts.esc50),
    (Fsd50k, layouts.fsd50k),
    (OpenMic, layouts.openmic),
    (TauUrban, layouts.tau_urban),
]


def read(published: PublishedSet, folder: Path, part: str) -> dict[str, tuple[str, ...]]:
    """Returns clip id → names of its classes."""
    source = published.source(published.find(folder), part)
    vocabulary = source.own_vocabulary()
    clips = [clip for clip in source.scan(vocabulary, Counter()) if isinstance(clip, PlannedClip)]
    return {clip.clip_id: tuple(vocabulary.names[label] for label in clip.labels) for clip in clips}


def test_esc_50_has_five_folds_and_its_own_numbers_of_classes(tmp_path: Path) -> None:
    layouts.esc50(tmp_path)
    assert Esc50.parts() == ("fold1", "fold2", "fold3", "fold4", "fold5")
    assert read(Esc50(), tmp_path, "fold3") == {
        "3-100000-A-0": ("rooster",),
        "3-100001-A-1": ("crying baby",),
        "3-100002-A-0": ("rooster",),
        "3-100003-A-1": ("crying baby",),
    }
    names = Esc50().source(Esc50.find(tmp_path), "fold1").own_vocabulary().names
    assert names == ("rooster", "crying baby")
    for fold in Esc50.rounds:
        assert {*fold.learn, fold.watch} == set(Esc50.parts())
        assert (fold.name, fold.watch in fold.learn, fold.test) == (fold.watch, False, None)


def test_fsd50k_has_three_splits_and_several_labels_a_clip(tmp_path: Path) -> None:
    layouts.fsd50k(tmp_path)
    train, val, test = (read(Fsd50k(), tmp_path, part) for part in ("train", "val", "eval"))
    assert (sorted(train), sorted(val), sorted(test)) == (
        ["100", "101", "102", "103", "104", "105"],
        ["106", "107", "108", "109"],
        ["0", "1", "2", "3"],
    )
    assert train["102"] == ("Bark", "Crack (whip)")
    assert test["0"] == ("Bark", "Crack (whip)", "Dog")


@pytest.mark.parametrize("pickled_keys", [False, True], ids=["keys as text", "keys as the publisher has them"])
def test_openmic_tells_what_was_judged_and_opens_no_pickle(tmp_path: Path, pickled_keys: bool) -> None:
    layouts.openmic(tmp_path, pickled_keys=pickled_keys)
    source = OpenMic().source(OpenMic.find(tmp_path), "train")
    clips = [clip for clip in source.scan(source.own_vocabulary(), Counter()) if isinstance(clip, PlannedClip)]
    assert [clip.labels for clip in clips] == [(0,), (), (2,), (), (1,), ()]
    assert [clip.label_mask for clip in clips] == [(0, 1), (1, 2), (0, 2), (0, 1), (1, 2), (0, 2)]
    assert len(read(OpenMic(), tmp_path, "test")) == 4


def test_tau_urban_numbers_the_scenes_by_the_alphabet_and_reads_the_one_fold(tmp_path: Path) -> None:
    layouts.tau_urban(tmp_path)
    assert read(TauUrban(), tmp_path, "train") == {
        "audio/park-vienna-0-0-a": ("park",),
        "audio/airport-vienna-1-0-a": ("airport",),
        "audio/park-vienna-2-0-b": ("park",),
        "audio/airport-vienna-3-0-s1": ("airport",),
    }
    assert len(read(TauUrban(), tmp_path, "evaluate")) == 2
    assert TauUrban().source(TauUrban.find(tmp_path), "train").own_vocabulary().names == ("airport", "park")


@pytest.mark.parametrize(("published", "make"), LAYOUTS, ids=lambda one: getattr(one, "__name__", ""))
def test_another_folder_is_told_by_the_file_that_is_missing(
    published: type[PublishedSet], make: Callable[[Path], Path], tmp_path: Path
) -> None:
    make(tmp_path / "set")
    part = published.rounds[0].learn[0]
    with pytest.raises(UsageError, match=f"has no .*{published.name} as its publisher ships it has"):
        published().source(tmp_path, part)
    sounds = sorted((tmp_path / "set").rglob("*.wav")) + sorted((tmp_path / "set").rglob("*.ogg"))
    for sound in sounds:
        sound.unlink()
    source = published().source(published.find(tmp_path / "set"), part)
    with pytest.raises(ManifestError, match=r"(file missing|has no audio/).*archive"):
        list(source.scan(source.own_vocabulary(), Counter()))


@pytest.mark.parametrize(
    ("published", "make", "file", "content", "told"),
    [
        (Esc50, layouts.esc50, "ESC-50-master/meta/esc50.csv", "filename,fold,target\na.wav,1,0\n", "category"),
        (
            Esc50,
            layouts.esc50,
            "ESC-50-master/meta/esc50.csv",
            "filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,0,cat\n",
            "don't pair off",
        ),
        (Fsd50k, layouts.fsd50k, "FSD50K.ground_truth/vocabulary.csv", "index,label,mid\n", "no header"),
        (OpenMic, layouts.openmic, "openmic-2018/class-map.json", '{"banjo": 1}', "numbered from 0"),
        (OpenMic, layouts.openmic, "openmic-2018/openmic-2018.npz", "no zip", "Y_true"),
        (
            TauUrban,
            layouts.tau_urban,
            "TAU-urban-acoustic-scenes-2020-mobile-development/meta.csv",
            "filename,scene_label\n",
            "scene_label",
        ),
    ],
)
def test_a_malformed_file_is_named_with_what_it_should_be(
    published: type[PublishedSet], make: Callable[[Path], Path], file: str, content: str, told: str, tmp_path: Path
) -> None:
    make(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(PipelineError, match=told) as raised:
        read(published(), tmp_path, published.rounds[0].learn[0])
    assert file.rpartition("/")[2] in str(raised.value)


def test_parts_side_by_side_are_one_dataset_and_keep_what_was_judged(tmp_path: Path) -> None:
    layouts.openmic(tmp_path)
    for part in OpenMic.parts():
        source = OpenMic().source(OpenMic.find(tmp_path), part)
        ingest(IngestConfig(out=str(tmp_path / "data" / part), name="openmic"), source)
    together = join_manifests(str(tmp_path / "data"), ("train", "test"))
    assert (len(together), together.shards) == (10, ["train/openmic-000000.tar", "test/openmic-000000.tar"])
    label_mask = together.label_mask(np.array([0, 9]))
    assert label_mask is not None
    assert label_mask.tolist() == [[True, True, False], [True, True, False]]
    train = read_manifest(tmp_path / "data" / "train")
    blind = train.table.set_column(train.table.column_names.index("label_mask"), "label_mask", [[None] * 6])
    assert type(train)(train.location, blind, train.vocabulary).identity != train.identity
    with pytest.raises(ManifestError, match="earlier row"):
        join_manifests(str(tmp_path / "data"), ("train", "train/../train"))


def test_what_was_judged_survives_copies_and_a_manifest_made_anew(tmp_path: Path) -> None:
    layouts.openmic(tmp_path)
    data = str(tmp_path / "train")
    ingest(IngestConfig(out=data, name="openmic"), OpenMic().source(OpenMic.find(tmp_path), "train"))
    made = read_manifest(data)
    before = made.table["label_mask"].to_pylist()
    assert before == [[0, 1], [1, 2], [0, 2], [0, 1], [1, 2], [0, 2]]
    copies = CopyConfig(clips_per_shard=2)
    reshard_dataset.run(reshard_dataset.ReshardConfig(data, out=str(tmp_path / "copy"), copies=copies))
    ingest(IngestConfig(out=str(tmp_path / "again"), classes=f"{data}/classes.csv"), WebdatasetSource((data,)))
    index_dataset.run(index_dataset.IndexConfig(str(tmp_path / "copy")))
    for name in ("copy", "again"):
        assert read_manifest(tmp_path / name).table["label_mask"].to_pylist() == before
    changed = [[0], *before[1:]]  # the manifest is what counts, and a copy's tars say what it says
    place = made.table.column_names.index("label_mask")
    column = pa.array(changed, pa.list_(pa.int16()))
    write_manifest(data, made.table.set_column(place, "label_mask", column), made.vocabulary)
    reshard_dataset.run(reshard_dataset.ReshardConfig(data, out=str(tmp_path / "later"), copies=copies))
    index_dataset.run(index_dataset.IndexConfig(str(tmp_path / "later")))
    assert read_manifest(tmp_path / "later").table["label_mask"].to_pylist() == changed


def test_the_label_mask_of_an_earlier_version_is_read_out_of_tars_manifests_and_ledgers(tmp_path: Path) -> None:
    layouts.openmic(tmp_path)
    source = OpenMic().source(OpenMic.find(tmp_path), "train")
    ingest(IngestConfig(out=str(tmp_path / "now"), name="openmic"), source)
    old = tmp_path / "old"
    rewrite_as_before(tmp_path / "now", old)
    now = read_manifest(tmp_path / "now")
    wanted = now.table["label_mask"].to_pylist()
    index_dataset.run(index_dataset.IndexConfig(str(old)))
    assert read_manifest(old).table["label_mask"].to_pylist() == wanted

    table = read_manifest(old).table
    earlier = table.rename_columns(["judged" if name == "label_mask" else name for name in table.column_names])
    metadata = pq.read_schema(old / MANIFEST_NAME).metadata
    plain = earlier.set_column(1, "shard", earlier["shard"].cast(pa.string()))
    pq.write_table(plain.replace_schema_metadata(metadata), old / MANIFEST_NAME)
    assert read_manifest(old).identity == now.identity
    copies = CopyConfig(clips_per_shard=2)
    reshard_dataset.run(reshard_dataset.ReshardConfig(str(old), out=str(tmp_path / "copy"), copies=copies))
    assert read_manifest(tmp_path / "copy").table["label_mask"].to_pylist() == wanted
    changed = [[0], *wanted[1:]]  # the manifest is what counts
    place = plain.column_names.index("judged")
    other = plain.set_column(place, "judged", pa.array(changed, pa.list_(pa.int16())))
    pq.write_table(other.replace_schema_metadata(metadata), old / MANIFEST_NAME)
    repair_dataset(str(old), [Fault(UNUSABLE_MANIFEST, MANIFEST_NAME)])
    assert pq.read_table(old / MANIFEST_NAME)["label_mask"].to_pylist() == changed

    folder = DatasetFolder(str(tmp_path / "begun"), "openmic")
    publish_ledger(folder.location, "openmic-000000.tar", "print", Ledger(earlier, []))
    (found,) = folder.ledgers({"openmic-000000.tar": "print"})
    assert found.rows["label_mask"].to_pylist() == wanted


def rewrite_as_before(dataset: Path, folder: Path) -> None:
    """Copy a dataset's tars with the descriptions that an earlier version wrote."""
    folder.mkdir()
    (folder / "classes.csv").write_bytes((dataset / "classes.csv").read_bytes())
    for tar in dataset.glob("*.tar"):
        with tarfile.open(tar) as source, tarfile.open(folder / tar.name, "w") as target:
            for member in source:
                content = source.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                if member.name.endswith(".json"):
                    content = content.replace(b'"label_mask"', b'"judged"')
                    member.size = len(content)
                target.addfile(member, io.BytesIO(content))
