"""Datasets are divided, verified and repaired where they lie, on an object store."""

from pathlib import Path

from pipeline.commands import reshard_dataset, split_dataset
from pipeline.commands.verify_path import VerifyConfig
from pipeline.commands.verify_path import run as verify
from pipeline.dataset.manifest import read_manifest
from pipeline.ingest.copying import CopyConfig
from pipeline.storage import files as storage


def test_a_dataset_on_s3_is_split_verified_and_gets_its_manifest_again(
    s3_folder: str, make_dataset, tmp_path: Path
) -> None:
    whole, train, evaluation = (f"{s3_folder}/{name}" for name in ("whole", "train", "eval"))
    copies = CopyConfig(clips_per_shard=7, workers=2)
    reshard_dataset.run(reshard_dataset.ReshardConfig(str(make_dataset(tmp_path / "raw")), out=whole, copies=copies))
    split_dataset.run(
        split_dataset.SplitConfig(whole, train=train, eval=evaluation, eval_share=0.3, stratify=True, copies=copies)
    )
    for dataset in (whole, train, evaluation):
        assert verify(VerifyConfig(dataset, decode=True)).faults == []
    before = read_manifest(whole).table
    sides = [set(read_manifest(side).clip_ids.to_pylist()) for side in (train, evaluation)]
    assert sorted([*sides[0], *sides[1]]) == sorted(before["clip_id"].to_pylist())

    storage.publish_bytes(f"{whole}/manifest.parquet", b"rot")
    found = verify(VerifyConfig(whole, repair=True))
    assert [fault.check for fault in found.faults] == ["unusable manifest"]
    assert found.left == []
    assert storage.read_bytes(f"{whole}/.damaged/manifest.parquet") == b"rot"
    assert read_manifest(whole).table == before
