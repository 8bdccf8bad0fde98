from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import student
import teacher
from pipeline.commands.train_teacher import (
    PatchoutConfig,
    TeacherAverageConfig,
    TrainTeacherConfig,
    run,
)
from pipeline.errors import UsageError
from pipeline.runtime.progress import read_metrics
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.teacher_learner import TeacherLearner, TeacherOptimizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_rates_fall_from_the_head_to_the_patches_and_decay_spares_what_it_should() -> None:
    model = teacher.create_model("passt_tiny", num_classes=4)
    learner = TeacherLearner(model, student.MixupConfig(), student.AugmentConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}

    def spelled(**settings: Any) -> dict[str, tuple[float, float]]:
        groups = learner.parameter_groups(TeacherOptimizerConfig(weight_decay=0.1, **settings))
        return {names[one]: (group["lr_scale"], group["weight_decay"]) for group in groups for one in group["params"]}

    found = spelled(layer_decay=0.5, decay_all=False)
    depth = model.config.depth
    assert found.keys() == set(names.values())
    assert found["head.1.weight"] == (1.0, 0.1)
    assert found[f"blocks.{depth - 1}.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["blocks.0.mlp.fc1.weight"] == (0.5**depth, 0.1)
    assert found["blocks.0.norm1.weight"] == (0.5**depth, 0.0)
    assert found["norm.weight"] == (0.5, 0.0)
    for name in ("cls_token", "new_pos_embed", "freq_new_pos_embed", "patch_embed.proj.bias"):
        assert found[name] == (0.5 ** (depth + 1), 0.0)
    assert found["patch_embed.proj.weight"] == (0.5 ** (depth + 1), 0.1)
    assert set(spelled().values()) == {(1.0, 0.1)}  # PaSST's recipe


def test_layer_decay_reaches_the_steps(config: TrainTeacherConfig, tmp_path: Path) -> None:
    still = replace(config, epochs=1, average=TeacherAverageConfig(kind="none"), eval_data=None)
    run(replace(still, optimizer=TeacherOptimizerConfig(layer_decay=1e-6)))
    torch.manual_seed(0)
    start = teacher.create_model("passt_tiny", num_classes=4).state_dict()
    end = load_file(tmp_path / "run" / "last.safetensors")
    assert torch.equal(end["patch_embed.proj.weight"], start["patch_embed.proj.weight"])
    assert not torch.equal(end["head.1.weight"], start["head.1.weight"])
    with pytest.raises(UsageError, match="layer_decay"):
        TeacherOptimizerConfig(layer_decay=0.0)


@pytest.mark.parametrize(("name", "frames_axis"), [("passt_tiny", 2), ("ast_tiny", 1)])
def test_masks_hide_bands_and_frames_whatever_axis_a_teacher_has_them_on(name: str, frames_axis: int) -> None:
    model = teacher.create_model(name, num_classes=4)
    augment = student.AugmentConfig(mask_frames=400)
    learner = TeacherLearner(model, student.MixupConfig(alpha=0), augment)
    features = torch.randn(3, 1000, 128) if frames_axis == 1 else torch.randn(3, 128, 1000)
    masked = learner.mask(features, student.Randomness.of_batch(3, torch.Generator().manual_seed(1)))
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
