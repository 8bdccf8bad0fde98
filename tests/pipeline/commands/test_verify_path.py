"""`pipeline verify`: every fault is found under its name; a repair mends what can be made again and loses nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_stores import fill_store

import student
from pipeline.cli import run as run_command
from pipeline.commands.reshard_dataset import ReshardConfig
from pipeline.commands.reshard_dataset import run as reshard
from pipeline.commands.verify_path import VerifyConfig, run
from pipeline.dataset.manifest import Manifest, read_manifest, write_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import ManifestError, PipelineError, UsageError, VerificationError
from pipeline.ingest.copying import CopyConfig
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import (
    open_store,
    publish_part,
    read_stamp,
    write_failures,
)
from pipeline.training.checkpoints import checkpoint_path, load_newest_checkpoint, save_checkpoint, save_weights
from pipeline.verification.faults import Findings


def verify(path: Path | str, **settings: object) -> Findings:
    return run(VerifyConfig(str(path), **{"workers": 2} | settings))  # pyright: ignore[reportArgumentType]


def faults(path: Path, tmp_path: Path, **settings: object) -> list[tuple[str, str, str | None]]:
    """Verify what has faults; give (check, file, clip id) of those that the list names."""
    listed = tmp_path / "faults.parquet"
    with pytest.raises(VerificationError):
        verify(path, out=str(listed), **settings)
    return [(row["check"], row["file"], row["clip_id"]) for row in pq.read_table(listed).to_pylist()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_dataset(make_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips in three shards, with checksums; clip 7 can't be decoded."""
    folder = tmp_path_factory.mktemp("sound")
    raw = make_dataset(folder / "raw", clips=12, broken=(7,))
    reshard(ReshardConfig(str(raw), out=str(folder / "d"), copies=CopyConfig(clips_per_shard=4, workers=1)))
    return folder / "d"


@pytest.fixture
def dataset(sound_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound_dataset, tmp_path / "d")


def rewrite(dataset: Path, change: Callable[[dict], dict | None], names: tuple[str, ...]) -> None:
    """Change the manifest's rows of some clips, past all checks; None takes a row away."""
    table = pq.read_table(dataset / "manifest.parquet")
    rows = [change(row) if row["clip_id"] in names else row for row in table.to_pylist()]
    changed = pa.Table.from_pylist([row for row in rows if row is not None], schema=table.schema)
    pq.write_table(changed, dataset / "manifest.parquet")


def shard_of(dataset: Path, clip_id: str) -> tuple[Path, int]:
    manifest = read_manifest(dataset)
    row = manifest.clip_ids.to_pylist().index(clip_id)
    return dataset / manifest.shards[manifest.shard_of_clip[row]], int(manifest.offsets[row])


def test_a_sound_dataset_has_no_faults(dataset: Path) -> None:
    found = verify(dataset)
    assert found.looked_at == {"shards": 3, "clips": 12}
    assert (found.faults, +found.notes) == ([], {})


def test_decoding_finds_what_is_no_sound_or_of_another_length(dataset: Path, tmp_path: Path) -> None:
    rewrite(dataset, lambda row: row | {"frames": 7_999, "sample_rate": 16_000}, ("clip2",))
    assert verify(dataset).faults == []
    assert faults(dataset, tmp_path, decode=True) == [
        ("another length", "d-000000.tar", "clip2"),
        ("undecodable sound", "d-000001.tar", "clip7"),
    ]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"offset": 10**9}, "outside the shard"),
        ({"size": 2**31 - 1}, "outside the shard"),
        ({"offset": 1}, "no sound at its place"),
        ({"size": 7}, "another size"),
        ({"format": "mp3"}, "another size"),
        ({"clip_id": "else"}, "another clip id"),
        ({"crc32": 7}, "other bytes"),
    ],
)
def test_a_row_that_does_not_fit_its_tar_is_found(dataset: Path, tmp_path: Path, change: dict, check: str) -> None:
    rewrite(dataset, lambda row: row | change, ("clip5",))
    assert faults(dataset, tmp_path) == [(check, "d-000001.tar", change.get("clip_id", "clip5"))]


def test_two_rows_of_one_sound_are_found(dataset: Path, tmp_path: Path) -> None:
    place = {name: pq.read_table(dataset / "manifest.parquet").to_pylist()[4][name] for name in ("offset", "size")}
    rewrite(dataset, lambda row: row | place, ("clip5",))
    assert faults(dataset, tmp_path) == [("another clip's place", "d-000001.tar", "clip5")]


def test_changed_bytes_missing_and_damaged_shards_are_found_and_never_taken_for_right(
    dataset: Path, tmp_path: Path
) -> None:
    shard, offset = shard_of(dataset, "clip1")
    with shard.open("r+b") as stream:
        stream.seek(offset + 20)
        stream.write(b"rot")
    (dataset / "d-000001.tar").unlink()
    with (dataset / "d-000002.tar").open("r+b") as stream:
        stream.truncate(shard_of(dataset, "clip11")[1] + 100)
    before = files(dataset)
    found = faults(dataset, tmp_path)
    assert found == [
        ("other bytes", "d-000000.tar", "clip1"),
        ("missing shard", "d-000001.tar", None),
        ("damaged shard", "d-000002.tar", None),
        ("outside the shard", "d-000002.tar", "clip11"),
    ]
    with pytest.raises(PipelineError, match=r"missing shard d-000001\.tar, so a manifest made now would lack"):
        verify(dataset, repair=True)
    assert files(dataset) == before


def test_strange_tars_and_stopped_ingests_are_told_and_no_fault(dataset: Path) -> None:
    shutil.copy(dataset / "d-000000.tar", dataset / "else.tar")
    (dataset / ".unfinished").mkdir()
    assert +verify(dataset).notes == {"ingest that was stopped here": 1, "tars that the manifest does not name": 1}


def test_a_lost_manifest_is_made_again_as_it_was(dataset: Path, tmp_path: Path) -> None:
    before = files(dataset)
    (dataset / "manifest.parquet").unlink()
    assert faults(dataset, tmp_path) == [("unusable manifest", "manifest.parquet", None)]
    assert len(verify(dataset, repair=True).faults) == 1
    assert files(dataset) == before
    assert verify(dataset).faults == []


def test_a_manifest_that_is_no_parquet_is_kept_aside(dataset: Path) -> None:
    before = files(dataset)
    for damage in (b"PAR1", b"PAR1 again"):
        (dataset / "manifest.parquet").write_bytes(damage)
        verify(dataset, repair=True)
    assert files(dataset) == before | {
        ".damaged/manifest.parquet": b"PAR1",
        ".damaged/1/manifest.parquet": b"PAR1 again",
    }


def test_a_manifest_made_again_keeps_labels_and_facts_and_lists_what_is_lost(dataset: Path, tmp_path: Path) -> None:
    shard, offset = shard_of(dataset, "clip1")
    with shard.open("r+b") as stream:
        stream.seek(offset + 20)
        stream.write(b"rot")
    known = {"labels": [3, 0], "frames": 8000, "start_seconds": 1.5}
    rewrite(dataset, lambda row: row | known | {"offset": 1}, ("clip5",))
    rewrite(dataset, lambda row: row | {"clip_id": "lost"}, ("clip9",))
    with pytest.raises(VerificationError, match="faults: 1"):  # the changed bytes
        verify(dataset, repair=True)
    assert verify(dataset).faults == []
    rows = {row["clip_id"]: row for row in read_manifest(dataset).table.to_pylist()}
    assert {name: rows["clip5"][name] for name in known} == known
    assert rows.keys() == {f"clip{number}" for number in range(12)} - {"clip1"}
    rejected = [(row["clip_id"], row["reason"]) for row in pq.read_table(dataset / "rejected.parquet").to_pylist()]
    assert rejected == [("clip1", "other bytes than the manifest's"), ("lost", "missing in the tars")]


@pytest.mark.parametrize("lost", [True, False])
def test_labels_are_not_given_another_meaning(dataset: Path, lost: bool) -> None:
    if lost:
        (dataset / "classes.csv").unlink()
    else:
        (dataset / "classes.csv").write_text("index,mid,display_name\n0,/other,Other\n")
    before = files(dataset)
    with pytest.raises(PipelineError, match=r"has no classes\.csv|Put the right classes\.csv back"):
        verify(dataset, repair=True)
    assert files(dataset) == before


def test_a_stopped_ingest_is_left_to_its_own_command(dataset: Path) -> None:
    (dataset / "manifest.parquet").unlink()
    (dataset / ".unfinished").mkdir()
    with pytest.raises(PipelineError, match="an ingest was stopped here"):
        verify(dataset, repair=True)


def test_a_dataset_behind_a_url_is_verified_and_repaired(dataset: Path) -> None:
    url = "memory://verify/d"
    reshard(ReshardConfig(str(dataset), out=url, copies=CopyConfig(clips_per_shard=4)))
    assert verify(url).faults == []
    manifest = read_manifest(url)
    table = manifest.table.set_column(
        manifest.table.column_names.index("offset"), "offset", pa.array(manifest.offsets + 1)
    )
    write_manifest(url, table, manifest.vocabulary)
    found = verify(url, repair=True)
    assert {fault.check for fault in found.faults} == {"no sound at its place"}
    assert found.left == []
    assert verify(url).faults == []
    assert read_manifest(url).table == manifest.table


# --- stores ---------------------------------------------------------------------------------------------------------


def write_store(folder: Path, manifest: Manifest) -> StoreStamp:
    logits = np.ones((len(manifest), len(manifest.vocabulary)), np.float16)
    store = fill_store(folder, manifest, logits, failed={"clip7": "no sound"})
    write_failures(str(folder), list(store.parts))
    return store.stamp


@pytest.fixture
def store(dataset: Path, tmp_path: Path) -> Path:
    write_store(tmp_path / "s", read_manifest(dataset))
    return tmp_path / "s"


def spoil(part: Path, value: float) -> None:
    """Write a part as somebody else's program would: the third clip's logits are no numbers."""
    table = pq.read_table(part)
    logits = np.stack(table["logits"].to_numpy())
    logits[2, 1] = value
    flat = pa.array(logits.reshape(-1).astype(np.float16))
    column = pa.FixedSizeListArray.from_arrays(flat, type=table.schema.field("logits").type)
    pq.write_table(table.set_column(1, table.schema.field("logits"), column), part)


def test_a_sound_store_covers_its_dataset_but_for_what_failed(store: Path, dataset: Path) -> None:
    found = verify(store, data=str(dataset))
    assert found.looked_at == {"parts": 3, "clips": 11}
    assert (found.faults, +found.notes) == ([], {"clips that the teachers could not be given": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_of_somebody_else_that_are_no_numbers_are_found_and_never_aligned(
    store: Path, dataset: Path, tmp_path: Path, value: float
) -> None:
    spoil(store / "d-000001.parquet", value)
    assert faults(store, tmp_path) == [("logits that are not finite", "d-000001.parquet", "clip6")]
    with pytest.raises(PipelineError, match=r"d-000001\.parquet: the logits of 1 clips are not finite, .* clip6"):
        open_store(str(store)).align(read_manifest(dataset), tmp_path / "cache")


def test_bad_parts_are_moved_out_of_the_way_of_the_command_that_makes_them_again(
    store: Path, dataset: Path, tmp_path: Path
) -> None:
    good, bad = read_stamp(str(store)), (store / "d-000000.parquet").read_bytes()[:-9]
    assert good is not None
    (store / "d-000000.parquet").write_bytes(bad)
    other = replace(good, precision="bfloat16")
    publish_part(str(store), "d-000002", ["clip8", "clip8"], np.ones((2, 4), np.float16), other, "identity")
    found = faults(store, tmp_path, data=str(dataset))
    assert found[:3] == [
        ("damaged part", "d-000000.parquet", None),
        ("repeated clip id", "d-000002.parquet", "clip8"),
        ("part made otherwise", "d-000002.parquet", None),
    ]
    assert found[3:] == [
        ("clips without logits", "d-000000.tar", None),
        ("clips without logits", "d-000002.tar", None),
    ]
    verify(store, repair=True)
    assert verify(store).faults == []
    assert sorted(files(store)) == [
        ".damaged/d-000000.parquet",
        ".damaged/d-000002.parquet",
        "d-000001.parquet",
        "failed.parquet",
        "store.json",
    ]
    assert (store / ".damaged" / "d-000000.parquet").read_bytes() == bad


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_stamp_is_written_again_from_parts_that_agree(store: Path, tmp_path: Path, content: bytes | None) -> None:
    stamp = read_stamp(str(store))
    (store / "store.json").unlink()
    if content is not None:
        (store / "store.json").write_bytes(content)
    assert faults(store, tmp_path) == [("unusable stamp", "store.json", None)]
    verify(store, repair=True)
    assert read_stamp(str(store)) == stamp


def test_a_stamp_is_not_guessed_from_parts_that_differ(store: Path, tmp_path: Path) -> None:
    stamp = read_stamp(str(store))
    assert stamp is not None
    (store / "store.json").unlink()
    publish_part(str(store), "x", ["x"], np.ones((1, 4), np.float16), replace(stamp, precision="bfloat16"), "x")
    assert faults(store, tmp_path, repair=True) == [("unusable stamp", "store.json", None)]
    assert not (store / "store.json").exists()


def test_the_list_of_failures_is_written_again(store: Path, tmp_path: Path) -> None:
    before = files(store)
    for damage in (b"no Parquet", None):
        if damage is None:
            write_failures(str(store), [])
        else:
            (store / "failed.parquet").write_bytes(damage)
        assert faults(store, tmp_path) == [("list of failed clips disagrees", "failed.parquet", None)]
        verify(store, repair=True)
        assert files(store) == before


def test_a_shard_whose_sounds_changed_is_told_from_one_cut_otherwise(
    store: Path, dataset: Path, tmp_path: Path
) -> None:
    copies = CopyConfig(clips_per_shard=6, workers=1)
    reshard(ReshardConfig(str(dataset), out=str(tmp_path / "r" / "d"), copies=copies))
    found = verify(store, data=str(tmp_path / "r" / "d"))
    assert found.faults == []
    assert found.notes["shards that are cut otherwise than the store's parts"] == 2
    rewrite(dataset, lambda row: row | {"crc32": 7}, ("clip1",))
    assert faults(store, tmp_path, data=str(dataset)) == [("shard changed since", "d-000000.tar", None)]


def test_a_store_of_other_classes_is_told(store: Path, dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    other = Vocabulary(tuple(LabelClass(index, f"/o/{index}", f"o {index}") for index in range(4)))
    write_manifest(dataset, manifest.table, other)
    assert faults(store, tmp_path, data=str(dataset)) == [("other classes", "store.json", None)]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for step in (10, 20):
        save_checkpoint(run, step, {"step": step, "model": {"weight": torch.ones(5)}}, keep=2)
    network = student.create_model("mn01", num_classes=4)
    metadata = {"stage": "student", "model": "mn01", "kwargs": {}, "classes": 4, "vocabulary_sha256": VOCABULARY.sha256}
    metadata["vocabulary"] = VOCABULARY.to_csv_bytes().decode()
    save_weights(run / "last.safetensors", network.state_dict(), metadata)
    (run / "config.toml").write_text("epochs = 2\n")
    lines = [json.dumps({"step": step, "epoch": 0, "train/loss": 0.5}) for step in (10, 20, 20)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "ep')
    return run


VOCABULARY = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(4)))


def test_a_sound_run_has_no_faults(training_run: Path) -> None:
    found = verify(training_run)
    assert found.looked_at == {"lines of metrics": 3, "checkpoints": 2, "files of weights": 1}
    assert (found.faults, +found.notes) == ([], {"last line that was not finished": 1})


def test_a_damaged_newest_checkpoint_is_moved_and_a_resume_takes_the_one_before(
    training_run: Path, tmp_path: Path
) -> None:
    newest = checkpoint_path(training_run, 20)
    content = bytearray(newest.read_bytes())
    content[content.index(torch.ones(5).numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    assert faults(training_run, tmp_path) == [("damaged checkpoint", "checkpoints/step-00000020.pt", None)]
    verify(training_run, repair=True)
    assert verify(training_run).faults == []
    assert (training_run / ".damaged" / "checkpoints" / "step-00000020.pt").read_bytes() == content
    found = load_newest_checkpoint(training_run)
    assert found is not None
    assert found[1]["step"] == 10


def test_the_last_checkpoints_are_not_moved_for_a_resume_would_begin_anew(training_run: Path) -> None:
    for step in (10, 20):
        checkpoint_path(training_run, step).write_bytes(b"")
    before = files(training_run)
    with pytest.raises(PipelineError, match="none of the 2 checkpoints is sound, so nothing was moved"):
        verify(training_run, repair=True)
    assert files(training_run) == before


def test_each_file_of_a_run_is_looked_at(training_run: Path, tmp_path: Path) -> None:
    save_checkpoint(training_run, 30, {"step": 29, "model": {}}, keep=3)
    save_checkpoint(training_run, 40, {"step": 40, "model": [{"weight": torch.tensor([1, np.nan])}]}, keep=4)
    (training_run / "best.safetensors").write_bytes((training_run / "last.safetensors").read_bytes()[:-1])
    (training_run / "config.toml").write_text("epochs = \n")
    lines = ["[]", '{"step": 9}', '{"step": 20, "epoch": 0}', '{"step": 10, "epoch": 0}', "{"]
    (training_run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert faults(training_run, tmp_path) == [
        ("unusable settings", "config.toml", None),
        *[("damaged line", "metrics.jsonl", None)] * 4,
        ("damaged checkpoint", "checkpoints/step-00000030.pt", None),
        ("damaged checkpoint", "checkpoints/step-00000040.pt", None),
        ("unusable weights", "best.safetensors", None),
    ]


def test_the_rounds_of_a_run_are_looked_at_like_runs(training_run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for name in ("fold1", "fold2"):
        shutil.copytree(training_run, whole / name)
    (whole / "config.toml").write_text("epochs = 2\n")
    found = verify(whole)
    assert found.looked_at == {"lines of metrics": 6, "checkpoints": 4, "files of weights": 2}
    assert (found.faults, +found.notes) == ([], {"last line that was not finished": 2})
    checkpoint_path(whole / "fold2", 20).write_bytes(b"")
    (whole / "fold1" / "last.safetensors").write_bytes(b"")
    (whole / "fold1" / "config.toml").write_text("epochs = \n")
    (whole / "fold1" / "metrics.jsonl").write_text("[]\n")
    assert faults(whole, tmp_path) == [
        ("unusable settings", "fold1/config.toml", None),
        ("damaged line", "fold1/metrics.jsonl", None),
        ("damaged checkpoint", "fold2/checkpoints/step-00000020.pt", None),
        ("unusable weights", "fold1/last.safetensors", None),
    ]
    with pytest.raises(VerificationError):
        verify(whole, repair=True)
    assert [path.name for path in (whole / ".damaged/fold2/checkpoints").iterdir()] == ["step-00000020.pt"]
    checkpoint_path(whole / "fold2", 10).write_bytes(b"")  # the other round's two sound ones are no help to this one
    with pytest.raises(PipelineError, match="fold2/checkpoints: none of the 1 checkpoints is sound"):
        verify(whole, repair=True)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_exit_code_says_whether_a_fault_is_left(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(dataset)]) == 0
    (dataset / "manifest.parquet").write_bytes(b"")
    assert run_command(["verify", str(dataset)]) == 1
    out, err = capfd.readouterr()
    assert "unusable manifest" in out
    assert "faults: 1; --out FILE lists them all" in err
    assert run_command(["verify", str(dataset), "--repair"]) == 0
    assert run_command(["verify", str(dataset)]) == 0


@pytest.mark.parametrize("settings", [{"workers": 0}, {"data": "x"}])
def test_settings_that_cannot_be_are_wrong_usage(dataset: Path, settings: dict) -> None:
    with pytest.raises(UsageError):
        verify(dataset, **settings)


def test_nothing_there_is_an_error(tmp_path: Path, store: Path) -> None:
    with pytest.raises(PipelineError, match="there is nothing here"):
        verify(tmp_path / "nothing")
    with pytest.raises(UsageError, match="--decode is for the sounds of a dataset"):
        verify(store, decode=True)
    with pytest.raises(ManifestError):
        verify(store, data=str(tmp_path / "nothing"))
