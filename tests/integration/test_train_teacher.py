from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import student
import teacher
from pipeline.checkpoints import list_checkpoints
from pipeline.errors import UsageError
from pipeline.progress import read_metrics
from pipeline.stages.train_teacher import PatchoutConfig, TeacherAverageConfig, TeacherLearner, TrainTeacherConfig, run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path, make_dataset: Callable[..., Path]) -> TrainTeacherConfig:
    data = str(make_dataset(tmp_path / "data", clips=8))
    return TrainTeacherConfig(
        data=data,
        eval_data=data,
        run=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        model="passt_tiny",
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
        patchout=PatchoutConfig(time=5, frequency=0, single=10),
        average=TeacherAverageConfig(start_epoch=0, every_epochs=1),
        checkpoint_minutes=0,
        keep_checkpoints=10,
    )


def test_a_fine_tuned_teacher_resumes_to_the_same_bits_and_can_teach(
    config: TrainTeacherConfig, tmp_path: Path
) -> None:
    weights = tmp_path / "run" / "last.safetensors"
    assert run(replace(config, export_dtype="float16")).finished
    straight = load_file(weights)
    assert {tensor.dtype for tensor in straight.values()} == {torch.float16}
    for path in list_checkpoints(tmp_path / "run")[2:]:
        path.unlink()
    assert run(replace(config, export_dtype="float16", resume=True)).steps == 4
    assert all(torch.equal(tensor, straight[key]) for key, tensor in load_file(weights).items())
    model = teacher.create_model("passt_tiny", weights).eval()
    with torch.inference_mode():
        assert model(model.front_end(torch.zeros(1, 320_000))).shape == (1, 4)
    assert model.config.s_patchout_t == 0


def test_a_patchout_that_leaves_nothing_is_refused_at_once(config: TrainTeacherConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--patchout: too much for passt_tiny"):
        run(replace(config, patchout=PatchoutConfig(time=10_000)))
    assert not (tmp_path / "run").exists()


def test_an_unknown_teacher_is_told_by_name(config: TrainTeacherConfig) -> None:
    with pytest.raises(UsageError, match="--model pasta"):
        run(replace(config, model="pasta"))


@pytest.mark.parametrize(("name", "frames_axis"), [("passt_tiny", 2), ("ast_tiny", 1)])
def test_masks_hide_bands_and_frames_whatever_axis_a_teacher_has_them_on(name: str, frames_axis: int) -> None:
    model = teacher.create_model(name, num_classes=4)
    augment = student.AugmentConfig(mask_frames=400)
    learner = TeacherLearner(model, student.MixupConfig(alpha=0), augment)
    features = torch.randn(3, 1000, 128) if frames_axis == 1 else torch.randn(3, 128, 1000)
    masked = learner.mask(features, torch.Generator().manual_seed(1))
    changed = (masked != features).all(dim=3 - frames_axis)  # (batch, frames): hidden in every band
    assert changed.any(dim=1).all()
    torch.testing.assert_close(
        masked.movedim(frames_axis, 1)[~changed], features.movedim(frames_axis, 1)[~changed], rtol=0, atol=0
    )


def test_augmentation_reaches_the_loss(config: TrainTeacherConfig, tmp_path: Path) -> None:
    losses = []
    for number, gain_db in enumerate((0.0, 20.0)):
        folder = tmp_path / f"run-{number}"
        run(replace(config, run=str(folder), epochs=1, augment=student.AugmentConfig(gain_db=gain_db)))
        losses.append(read_metrics(folder)[-1]["epoch/loss"])
    assert losses[0] != losses[1]
