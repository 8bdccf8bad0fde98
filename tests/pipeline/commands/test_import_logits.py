import hashlib
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_logits import (
    Tagged,
    sigmoid,
    tagged_clips,
    write_ced,
    write_efficientat,
    write_parquet,
)

from pipeline.commands import import_logits, inspect_path, train_student
from pipeline.commands.import_logits import ImportLogitsConfig
from pipeline.dataset.manifest import read_manifest, write_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary, audioset_vocabulary
from pipeline.errors import ForeignLogitsError, PipelineError, TooManyFailuresError, UsageError
from pipeline.logits.alignment import AlignedLogits
from pipeline.logits.store import open_store
from pipeline.runtime.progress import read_metrics


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Tagged:
    return tagged_clips(tmp_path_factory.mktemp("tagged"))


@pytest.fixture
def npy(tagged: Tagged, tmp_path: Path) -> ImportLogitsConfig:
    """EfficientAT's two files, rows in another order than the dataset's."""
    return efficientat_config(tmp_path, tagged, np.random.default_rng(1).permutation(len(tagged.ids)))


def efficientat_config(folder: Path, tagged: Tagged, order: np.ndarray, shift: int = 0) -> ImportLogitsConfig:
    """Files whose rows are the clips in `order`; `shift` puts each row's numbers that many rows further."""
    names = [tagged.ids[row] for row in order]
    array, index = write_efficientat(folder, names, np.roll(tagged.logits[order], shift, axis=0))
    return ImportLogitsConfig(data=tagged.data, store=str(folder / "store"), npy=array, index=index)


def aligned(config: ImportLogitsConfig, folder: Path) -> AlignedLogits:
    return open_store(config.store).align(read_manifest(config.data), folder / "aligned")


def bytes_of(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store).glob("train-*.parquet")}


def test_efficientats_logits_come_back_to_the_bit_by_id(
    npy: ImportLogitsConfig, tagged: Tagged, tmp_path: Path
) -> None:
    import_logits.run(npy)
    store = open_store(npy.store)
    assert [part.file.name for part in store.parts] == [f"train-{shard:06}.parquet" for shard in range(4)]
    assert [part.shard_identity for part in store.parts] == [
        tagged.manifest.shard_identity(shard) for shard in tagged.manifest.shards
    ]
    found = aligned(npy, tmp_path)
    assert found.has_logits.all()
    np.testing.assert_array_equal(found.logits, tagged.logits)


def test_the_stamp_says_what_files_they_were_and_no_more(npy: ImportLogitsConfig, tagged: Tagged) -> None:
    import_logits.run(replace(npy, origin="nine PaSST, EfficientAT's release"))
    stamp = open_store(npy.store).stamp
    assert npy.npy is not None
    assert npy.index is not None
    assert stamp.imported is not None
    assert [(file.name, file.size, file.sha256) for file in stamp.imported.files] == [
        (Path(path).name, Path(path).stat().st_size, hashlib.sha256(Path(path).read_bytes()).hexdigest())
        for path in (npy.npy, npy.index)
    ]
    assert (stamp.imported.layout, stamp.imported.held, stamp.imported.conversion) == ("efficientat-npy", "logits", "")
    assert (stamp.imported.origin, stamp.precision) == ("nine PaSST, EfficientAT's release", "unknown")
    assert (stamp.teachers, stamp.top_k, stamp.vocabulary_sha256) == ((), None, audioset_vocabulary().sha256)


def test_inspect_shows_the_origin(npy: ImportLogitsConfig, tagged: Tagged, capsys: pytest.CaptureFixture[str]) -> None:
    import_logits.run(replace(npy, origin="nine PaSST"))
    inspect_path.run(inspect_path.InspectConfig(npy.store, data=tagged.data))
    shown = capsys.readouterr().out
    for told in ("nine PaSST", "efficientat-npy", "fname_to_index.pkl", "240 of 240 (100.0 %)"):
        assert told in shown


def test_names_are_read_by_the_one_id_rule(tagged: Tagged, tmp_path: Path) -> None:
    spellings = ["{}", "Y{}.mp3", "12/Y{}.mp3", "{}_30.000_40.000.wav", "{}_30000", "audio/{}.flac"]
    names = [spellings[row % len(spellings)].format(clip_id) for row, clip_id in enumerate(tagged.ids)]
    array, index = write_efficientat(tmp_path, names, tagged.logits)
    config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), npy=array, index=index)
    import_logits.run(config)
    np.testing.assert_array_equal(aligned(config, tmp_path).logits, tagged.logits)


def test_clips_that_the_files_lack_and_rows_of_no_clip_are_counted(
    tagged: Tagged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = np.arange(30, 200)  # half the first shard's, and none of the last's but 20
    names = [tagged.ids[row] for row in order] + [f"nobody{row:05}" for row in range(7)]
    numbers = np.concatenate([tagged.logits[order], np.full((7, 527), 1)])
    array, index = write_efficientat(tmp_path, names, numbers)
    config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), npy=array, index=index)
    with caplog.at_level(logging.INFO, "pipeline"):
        import_logits.run(config)
    assert "logits of 170 of 240 clips; 70 are not in the files; 0 have" in caplog.text
    assert "7 of 177 rows are of no clip" in caplog.text
    found = aligned(config, tmp_path)
    assert np.flatnonzero(found.has_logits).tolist() == order.tolist()


def test_rows_that_no_name_points_to_and_second_rows_of_a_clip_are_left_out(
    tagged: Tagged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.concatenate([tagged.logits, tagged.logits[:3] + 1])
    names = [*tagged.ids, *(f"Y{clip_id}.mp3" for clip_id in tagged.ids[:3])]
    path = write_parquet(tmp_path / "logits.parquet", names, values)
    config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), parquet=(path,), held="logits")
    import_logits.run(config)
    assert "3 rows are of clips that earlier rows are of" in caplog.text
    np.testing.assert_array_equal(aligned(config, tmp_path).logits, tagged.logits)


class TestFit:
    def test_shuffled_rows_are_refused_before_anything_is_written(self, tagged: Tagged, tmp_path: Path) -> None:
        config = efficientat_config(tmp_path, tagged, np.arange(240))
        assert config.npy is not None
        np.save(config.npy, np.random.default_rng(5).permutation(tagged.logits))
        with pytest.raises(
            ForeignLogitsError, match=r"do not fit the labels.*mAP 0\.\d+ on 240 clips.*dealt out at random"
        ):
            import_logits.run(config)
        assert not Path(config.store).exists()

    @pytest.mark.parametrize("shift", [1, -1, 2])
    def test_rows_that_are_off_are_refused_and_the_offset_is_told(
        self, tagged: Tagged, tmp_path: Path, shift: int
    ) -> None:
        config = efficientat_config(tmp_path, tagged, np.arange(240), shift)
        told = f"clip {abs(shift)} rows {'back' if shift > 0 else 'on'} fit better"
        with pytest.raises(ForeignLogitsError, match=told):
            import_logits.run(config)
        assert not Path(config.store).exists()

    def test_rows_that_are_off_from_somewhere_on_are_refused(self, tmp_path: Path) -> None:
        tagged = tagged_clips(tmp_path / "data", 2400)
        numbers = tagged.logits.copy()
        numbers[1800:] = np.roll(tagged.logits[1800:], 1, axis=0)
        array, index = write_efficientat(tmp_path, tagged.ids, numbers)
        config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), npy=array, index=index)
        with pytest.raises(ForeignLogitsError, match="the clip 1 rows back fit better"):
            import_logits.run(config)

    def test_classes_in_another_order_are_refused(self, tagged: Tagged, tmp_path: Path) -> None:
        config = efficientat_config(tmp_path, tagged, np.arange(240))
        assert config.npy is not None
        np.save(config.npy, np.roll(tagged.logits, 1, axis=1))
        with pytest.raises(ForeignLogitsError, match="classes are in another order"):
            import_logits.run(config)

    def test_rows_sorted_by_class_pass(self, tmp_path: Path) -> None:
        tagged = tagged_clips(tmp_path / "data", by_class=True)
        config = efficientat_config(tmp_path, tagged, np.arange(240))
        import_logits.run(config)
        assert aligned(config, tmp_path).has_logits.all()

    def test_a_misfit_can_be_allowed(self, tagged: Tagged, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = replace(efficientat_config(tmp_path, tagged, np.arange(240), 1), allow_misfit=True)
        import_logits.run(config)
        assert "imported all the same" in caplog.text
        np.testing.assert_array_equal(aligned(config, tmp_path).logits, np.roll(tagged.logits, 1, axis=0))

    def test_what_has_no_labels_can_not_be_checked_and_says_so(self, tmp_path: Path) -> None:
        tagged = tagged_clips(tmp_path / "data", 20)
        table = tagged.manifest.table
        place = table.schema.get_field_index("labels")
        bare = table.set_column(place, "labels", pa.array([[]] * 20, table.schema.field("labels").type))
        write_manifest(tagged.data, bare, tagged.manifest.vocabulary)
        config = efficientat_config(tmp_path, tagged, np.arange(20))
        with pytest.raises(ForeignLogitsError, match="none of their 20 clips has a label"):
            import_logits.run(config)

    def test_probabilities_said_to_be_logits_are_refused(self, tagged: Tagged, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "some.parquet", tagged.ids, sigmoid(tagged.logits))
        config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), parquet=(path,), held="logits")
        with pytest.raises(ForeignLogitsError, match="within 0 and 1, so they are no logits"):
            import_logits.run(config)


class TestParquet:
    @pytest.mark.parametrize(
        "kind",
        [pa.list_(pa.float16()), pa.list_(pa.float32()), pa.list_(pa.float64(), 527), pa.list_(pa.float16(), 527)],
        ids=str,
    )
    def test_lists_of_any_float_in_several_files(self, tagged: Tagged, tmp_path: Path, kind: pa.ListType) -> None:
        order = np.random.default_rng(2).permutation(240)
        halves = [
            write_parquet(
                tmp_path / f"{number}.parquet",
                [tagged.ids[row] for row in half],
                tagged.logits[half],
                kind,
                "video_id said",
            )
            for number, half in enumerate(np.split(order, 2))
        ]
        config = ImportLogitsConfig(
            data=tagged.data,
            store=str(tmp_path / "store"),
            parquet=tuple(halves),
            id_column="video_id",
            values_column="said",
            held="logits",
        )
        import_logits.run(config)
        np.testing.assert_array_equal(aligned(config, tmp_path).logits, tagged.logits)

    def test_probabilities_become_logits_and_the_stamp_says_how(self, tagged: Tagged, tmp_path: Path) -> None:
        probabilities = sigmoid(tagged.logits)
        probabilities[0, :2] = 0, 1
        path = write_parquet(tmp_path / "p.parquet", tagged.ids, probabilities, pa.list_(pa.float64()))
        config = ImportLogitsConfig(
            data=tagged.data, store=str(tmp_path / "store"), parquet=(path,), held="probabilities"
        )
        import_logits.run(config)
        found = aligned(config, tmp_path).logits
        np.testing.assert_allclose(found[1:], tagged.logits[1:], atol=0.01)
        np.testing.assert_allclose(found[0, :2], [-13.8155, 13.8155], atol=0.01)
        imported = open_store(config.store).stamp.imported
        assert imported is not None
        assert imported.held == "probabilities"
        assert imported.conversion == "logit of probabilities held within 1e-06 and 1 - 1e-06"

    def test_a_class_list_of_their_own_renumbers_the_classes(self, tagged: Tagged, tmp_path: Path) -> None:
        order = np.random.default_rng(4).permutation(527)
        theirs = [audioset_vocabulary().classes[number] for number in order]
        # Some are known by their names alone, and one class is of no interest here.
        labels = [LabelClass(at, one.mid if at % 2 else f"own-{at}", one.name) for at, one in enumerate(theirs)]
        own = Vocabulary((*labels, LabelClass(527, "extra", "Extra")))
        (tmp_path / "own.csv").write_bytes(own.to_csv_bytes())
        values = np.concatenate([tagged.logits[:, order], np.full((240, 1), 9)], axis=1)
        path = write_parquet(tmp_path / "own.parquet", tagged.ids, values)
        config = ImportLogitsConfig(
            data=tagged.data,
            store=str(tmp_path / "store"),
            parquet=(path,),
            held="logits",
            classes=str(tmp_path / "own.csv"),
        )
        import_logits.run(config)
        np.testing.assert_array_equal(aligned(config, tmp_path).logits, tagged.logits)
        imported = open_store(config.store).stamp.imported
        assert imported is not None
        assert imported.conversion == f"527 of 528 classes, renumbered from the list with sha256 {own.sha256}"

    @pytest.mark.parametrize(
        ("table", "told"),
        [
            (pa.table({"id": ["a"], "logits": [[1.0] * 527]}), "no column clip_id; it has id, logits"),
            (pa.table({"clip_id": [1], "logits": [[1.0] * 527]}), "column clip_id is int64; expected strings"),
            (pa.table({"clip_id": ["a"], "logits": [[1] * 527]}), "column logits is list.*expected lists of floats"),
            (pa.table({"clip_id": ["a"], "logits": [1.0]}), "column logits is double; expected lists of floats"),
            (pa.table({"clip_id": ["a"], "logits": [[1.0] * 500]}), "has 500 numbers a row.*has 527 classes"),
            (
                pa.table({"clip_id": ["x", "ID"], "logits": [[1.0] * 527, [1.0] * 3]}),
                "logits of row 1 of all files has 3 numbers, but the first row has 527",
            ),
            (pa.table({"clip_id": ["x", "ID"], "logits": [[1.0] * 527, None]}), "logits of row 1 of all files is null"),
            (pa.table({"clip_id": ["x"], "logits": [[1.0] * 527]}), "of its 1 rows none is of a clip"),
            (
                pa.table({"clip_id": pa.array([], pa.string()), "logits": pa.array([], pa.list_(pa.float32()))}),
                "no rows",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_clear_error(
        self, tagged: Tagged, tmp_path: Path, table: pa.Table, told: str
    ) -> None:
        names = [tagged.ids[0] if name == "ID" else name for name in table.column(0).to_pylist()]
        pq.write_table(table.set_column(0, table.column_names[0], [names]) if names else table, tmp_path / "x.parquet")
        config = ImportLogitsConfig(
            data=tagged.data, store=str(tmp_path / "store"), parquet=(str(tmp_path / "x.parquet"),), held="logits"
        )
        with pytest.raises(PipelineError, match=told):
            import_logits.run(config)
        assert not Path(config.store).exists()

    @pytest.mark.parametrize("size", [0, 100, 5000])
    def test_a_damaged_file_is_one_clear_error(self, tagged: Tagged, tmp_path: Path, size: int) -> None:
        path = Path(write_parquet(tmp_path / "x.parquet", tagged.ids, tagged.logits))
        path.write_bytes(path.read_bytes()[:size])
        config = ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "s"), parquet=(str(path),), held="logits")
        with pytest.raises(ForeignLogitsError, match=r"x\.parquet: is no readable Parquet file"):
            import_logits.run(config)


class TestCed:
    def config(self, tagged: Tagged, folder: Path, *files: str) -> ImportLogitsConfig:
        return ImportLogitsConfig(data=tagged.data, store=str(folder / "store"), hdf5=files)

    def test_one_epoch_keeps_its_largest_as_logits_and_ceds_own_rest(self, tagged: Tagged, tmp_path: Path) -> None:
        order = np.random.default_rng(6).permutation(240)
        probabilities = sigmoid(tagged.logits)
        names = [f"{tagged.ids[row]}.wav" for row in order]
        pieces = np.split(order, [100])
        files = [
            write_ced(tmp_path / "ced", 1, names[:100], probabilities[pieces[0]], process=0),
            write_ced(tmp_path / "ced", 1, names[100:], probabilities[pieces[1]], process=1),
        ]
        import_logits.run(self.config(tagged, tmp_path, str(tmp_path / "ced")))
        store = open_store(str(tmp_path / "store"))
        assert store.stamp.top_k == 20
        assert store.stamp.imported is not None
        assert [file.name for file in store.stamp.imported.files] == [
            name for file in files for name in (Path(file).name, Path(file).with_suffix(".parquet").name)
        ]
        assert store.stamp.imported.held == "probabilities"
        assert "augmented views stand for the clip" in store.stamp.imported.conversion
        found = store.align(tagged.manifest, tmp_path / "aligned")
        kept = np.argsort(-probabilities, axis=1, kind="stable")[:, :20]
        halves = np.take_along_axis(probabilities, kept, axis=1).astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(
            np.take_along_axis(found.logits, kept, axis=1), np.log(halves / (1 - halves)), atol=0.01
        )
        left_out = np.argsort(-probabilities, axis=1, kind="stable")[:, 20:]
        rest = halves.min(axis=1, keepdims=True) / 507
        np.testing.assert_allclose(
            np.take_along_axis(found.logits, left_out, axis=1), np.repeat(np.log(rest / (1 - rest)), 507, 1), atol=0.01
        )

    def test_several_epochs_are_averaged_as_probabilities(self, tagged: Tagged, tmp_path: Path) -> None:
        probabilities = sigmoid(tagged.logits)
        views = [np.clip(probabilities * factor, 0, 0.99) for factor in (0.5, 0.9)]
        files = [write_ced(tmp_path, epoch, tagged.ids, view, top_k=526) for epoch, view in enumerate(views, 1)]
        import_logits.run(self.config(tagged, tmp_path, *files))
        found = open_store(str(tmp_path / "store")).align(tagged.manifest, tmp_path / "aligned").logits
        mean = np.mean(views, axis=0)
        top = np.argsort(-mean, axis=1)[:, :50]
        np.testing.assert_allclose(
            sigmoid(np.take_along_axis(found, top, axis=1)), np.take_along_axis(mean, top, axis=1), rtol=0.02
        )

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda file: file.pop("seeds"), "has no dataset seeds; it holds topk_indexes, topk_values"),
            (lambda file: file["seeds"].resize((5,)), r"datasets do not fit each other: .*seeds \(5,"),
            (
                lambda file: replaced(file, "topk_values", np.ones((240, 20), int)),
                r"topk_values is int64 .*expected floats",
            ),
            (
                lambda file: file["topk_indexes"].write_direct(np.full((240, 20), 527, np.int16)),
                r"527.*there are 527 classes",
            ),
            (
                lambda file: file["topk_values"].write_direct(np.full((240, 20), 1.5, np.float16)),
                r"holds 1\.5, which is no probability",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_clear_error(
        self, tagged: Tagged, tmp_path: Path, damage: Callable[[h5py.File], object], told: str
    ) -> None:
        path = write_ced(tmp_path, 1, tagged.ids, sigmoid(tagged.logits))
        with h5py.File(path, "r+") as file:
            damage(file)
        with pytest.raises(ForeignLogitsError, match=told):
            import_logits.run(self.config(tagged, tmp_path, path))

    def test_names_that_are_fewer_than_rows_are_refused(self, tagged: Tagged, tmp_path: Path) -> None:
        path = write_ced(tmp_path, 1, tagged.ids, sigmoid(tagged.logits))
        table = Path(path).with_suffix(".parquet")
        pq.write_table(pq.read_table(table).slice(1), table)
        with pytest.raises(ForeignLogitsError, match=r"has 240 rows, but .* names 239"):
            import_logits.run(self.config(tagged, tmp_path, path))

    def test_chunks_of_sounds_are_refused(self, tagged: Tagged, tmp_path: Path) -> None:
        path = write_ced(tmp_path, 1, tagged.ids, sigmoid(tagged.logits))
        table = pq.read_table(Path(path).with_suffix(".parquet"))
        later = table.set_column(1, "start", pa.array(np.arange(240) % 2, pa.float32()))
        pq.write_table(later, Path(path).with_suffix(".parquet"))
        with pytest.raises(ForeignLogitsError, match="120 of 240 rows are of later chunks"):
            import_logits.run(self.config(tagged, tmp_path, path))

    @pytest.mark.parametrize("size", [0, 700, 9000])
    def test_a_damaged_file_is_one_clear_error(self, tagged: Tagged, tmp_path: Path, size: int) -> None:
        path = Path(write_ced(tmp_path, 1, tagged.ids, sigmoid(tagged.logits)))
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ForeignLogitsError, match="is no readable HDF5 file"):
            import_logits.run(self.config(tagged, tmp_path, str(path)))


def replaced(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


class TestEfficientAtFiles:
    @pytest.mark.parametrize(
        ("array", "told"),
        [
            (np.zeros((10, 527), np.float16), "names row 239, but .* has 10 rows"),
            (np.zeros((240, 500), np.float16), "has 500 numbers a row"),
            (np.zeros(527, np.float16), r"float16 \(527,\); expected \(rows, classes\)"),
            (np.zeros((240, 527), np.int16), "holds int16"),
            (np.array([{}]), "is no readable .npy file"),
        ],
    )
    def test_an_array_that_does_not_fit_is_one_clear_error(
        self, npy: ImportLogitsConfig, array: np.ndarray, told: str
    ) -> None:
        assert npy.npy is not None
        np.save(npy.npy, array)
        with pytest.raises(PipelineError, match=told):
            import_logits.run(npy)

    @pytest.mark.parametrize("size", [0, 5, 60, 5000])
    def test_a_damaged_array_is_one_clear_error(self, npy: ImportLogitsConfig, size: int) -> None:
        assert npy.npy is not None
        Path(npy.npy).write_bytes(Path(npy.npy).read_bytes()[:size])
        with pytest.raises(ForeignLogitsError, match=r"is no readable \.npy file"):
            import_logits.run(npy)

    def test_two_names_of_one_row_are_refused(self, npy: ImportLogitsConfig) -> None:
        assert npy.index is not None
        Path(npy.index).write_bytes(pickle.dumps({"a": 0, "b": 1, "c": 1}))
        with pytest.raises(ForeignLogitsError, match="b and c are both row 1"):
            import_logits.run(npy)


def test_numbers_that_are_not_finite_are_listed_and_too_many_end_the_run(
    npy: ImportLogitsConfig, tagged: Tagged, tmp_path: Path
) -> None:
    assert npy.npy is not None
    numbers = np.load(npy.npy)
    numbers[5, 3], numbers[6, 4] = np.nan, np.inf
    np.save(npy.npy, numbers)
    import_logits.run(npy)
    failed = pq.read_table(Path(npy.store) / "failed.parquet").to_pylist()
    assert [one["reason"] for one in failed] == ["non-finite logits"] * 2
    missing = np.flatnonzero(~aligned(npy, tmp_path).has_logits)
    assert {one["clip_id"] for one in failed} == {tagged.ids[row] for row in missing}
    with pytest.raises(TooManyFailuresError, match=r"2 of 240 clips .*not finite \(0\.8 %, limit 0\.1 %\)"):
        import_logits.run(replace(npy, max_failed=0.001))


def test_a_rerun_does_only_what_is_missing(npy: ImportLogitsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import_logits.run(npy)
    whole = bytes_of(npy.store)
    gone = Path(npy.store) / "train-000002.parquet"
    gone.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in Path(npy.store).glob("train-*.parquet")}
    import_logits.run(npy)
    after = {path.name: path.stat().st_mtime_ns for path in Path(npy.store).glob("train-*.parquet")}
    assert bytes_of(npy.store) == whole
    assert {name: after[name] for name in before} == before


def test_other_files_do_not_mix_into_a_store(npy: ImportLogitsConfig, tagged: Tagged, tmp_path: Path) -> None:
    import_logits.run(npy)
    whole = bytes_of(npy.store)
    path = write_parquet(tmp_path / "logits.parquet", tagged.ids, tagged.logits)
    other = ImportLogitsConfig(data=tagged.data, store=npy.store, parquet=(path,), held="logits")
    with pytest.raises(UsageError, match=r"was made otherwise \(imported layout is efficientat-npy, not parquet"):
        import_logits.run(other)
    assert bytes_of(npy.store) == whole
    import_logits.run(replace(other, overwrite=True))
    imported = open_store(npy.store).stamp.imported
    assert imported is not None
    assert imported.layout == "parquet"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no logits are given"),
        ({"npy": "a.npy"}, "--npy and --index belong together"),
        ({"npy": "a.npy", "index": "i", "parquet": ("x",)}, "--npy and --parquet are given"),
        ({"parquet": ("x",)}, "say by --held"),
        ({"hdf5": ("x",), "store": "data"}, "are both data"),
        ({"hdf5": ("x",), "max_failed": 2}, "max_failed is 2"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict, told: str) -> None:
    settings: dict[str, Any] = {"data": "data", "store": "store"} | given
    with pytest.raises(UsageError, match=told):
        ImportLogitsConfig(**settings)


@pytest.mark.parametrize("path", ["none.npy", "s3://bucket/none.npy"])
def test_files_have_to_be_here(npy: ImportLogitsConfig, path: str) -> None:
    with pytest.raises(UsageError, match=r"--npy .*none\.npy: (there is no such file|has to be on this machine)"):
        import_logits.run(replace(npy, npy=path))


def test_a_student_learns_from_imported_logits(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", clips=20)
    manifest = read_manifest(data)
    logits = 8 * manifest.label_matrix(np.arange(20)) - 4
    path = write_parquet(tmp_path / "logits.parquet", [f"clip{row}" for row in range(20)], logits)
    store = tmp_path / "store"
    import_logits.run(ImportLogitsConfig(data=str(data), store=str(store), parquet=(path,), held="logits"))
    train_student.run(
        train_student.TrainStudentConfig(
            data=str(data),
            store=str(store),
            eval_data=str(data),
            run=str(tmp_path / "run"),
            cache=str(tmp_path / "cache"),
            model="mn01",
            epochs=1,
            log_every=1,
            batch_size=20,
            workers=0,
            device="cpu",
        )
    )
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert np.isfinite(losses).all()
    assert losses
