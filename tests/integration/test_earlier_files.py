"""Files that a release wrote before its modules moved are read, and its work goes on from where it stood.

`earlier_files` was written by version 0.1.0 at commit bb9d183: a dataset of twelve tones and noises in three shards,
the store that `passt_tiny` with the weights of `weights_by_formula` made of it, the folder of a run of twelve steps as
it was after seven, and the weights that this very run ended with.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import teacher
from pipeline.commands import train_student, verify_path
from pipeline.dataset.manifest import read_manifest
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.store import open_store

EARLIER = Path(__file__).parent / "earlier_files"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working folder: the run's settings name its paths relatively."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights_by_formula(network: nn.Module) -> None:
    """Fill with multiples of 1/8192, which are the same on every machine."""
    with torch.no_grad():
        for number, tensor in enumerate(network.state_dict().values()):
            steps = (torch.arange(tensor.numel()) * 7919 + 104729 * number) % 1024 - 512
            tensor.copy_((steps / 8192).reshape(tensor.shape))


@pytest.mark.parametrize("kind", ["data", "store", "run"])
def test_earlier_files_are_whole_to_verify(earlier: Path, kind: str) -> None:
    data = "data" if kind == "store" else None
    assert verify_path.run(verify_path.VerifyConfig(kind, data=data)).faults == []


def test_earlier_store_is_finished_by_the_same_teacher(earlier: Path) -> None:
    manifest, before = read_manifest("data"), open_store("store")
    network = teacher.create_model("passt_tiny", num_classes=len(manifest.vocabulary))
    weights_by_formula(network)
    save_file(network.state_dict(), "passt_tiny.safetensors")
    specs = (TeacherSpec.parse("passt_tiny=passt_tiny.safetensors"),)
    stamp = replace(stamp_teachers(specs, manifest, "float32"), members="float16")
    assert stamp == before.stamp, "otherwise the run would refuse to add to the store"

    logits = {part.file.name: before.part_logits(part) for part in before.parts}
    os.remove("store/data-000001.parquet")
    labeller = ShardLabeller(LabellerConfig(data="data", store="store", teachers=specs, stamp=stamp, batch_size=2))
    labeller.label_shard("data-000001.tar")
    labeller.close()
    after = open_store("store")
    assert [part.file.name for part in after.parts] == list(logits)
    for part in after.parts:
        np.testing.assert_allclose(after.part_logits(part), logits[part.file.name], rtol=1e-3, atol=1e-3)


def test_earlier_run_goes_on_to_the_weights_that_it_would_have_reached(earlier: Path, one_thread: None) -> None:
    config = train_student.TrainStudentConfig(
        data="data",
        store="store",
        eval_data="data",
        run="run",
        resume=True,
        epochs=4,
        batch_size=4,
        model="mn01",
        precision="float32",
        device="cpu",
        workers=0,
        cache="cache",
    )
    assert train_student.run(config).steps == 12
    reached, expected = load_file("run/last.safetensors"), load_file("uninterrupted.safetensors")
    # Another processor may sum in another order; a step lost or done twice changes far more.
    torch.testing.assert_close(reached, expected, rtol=1e-3, atol=1e-5)
