from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_stores import fill_store, stamp_for
from safetensors.torch import load_file

import student
import teacher
from pipeline.commands.train_teacher import (
    PatchoutConfig,
    TeacherAverageConfig,
    TrainTeacherConfig,
    run,
)
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import UsageError
from pipeline.logits.store import publish_part, write_stamp
from pipeline.runtime.progress import read_metrics
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.run import open_clips
from pipeline.training.stored_logits import open_logits
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


@pytest.fixture
def store(config: TrainTeacherConfig, tmp_path: Path) -> str:
    """Logits of other teachers for all clips but the last two."""
    manifest = read_manifest(config.data)
    logits = np.random.default_rng(0).normal(0, 3, (8, 4)).astype(np.float16)
    fill_store(tmp_path / "store", manifest, logits, absent=["clip6", "clip7"])
    return str(tmp_path / "store")


def test_a_transformer_learns_from_a_store_by_a_student_s_loss(
    config: TrainTeacherConfig, store: str, tmp_path: Path
) -> None:
    distill = student.DistillConfig(teacher_weight=0.7, temperature=2.0)
    mixed = student.MixupConfig(alpha=0)
    plain = replace(config, store=store, distill=distill, mixup=mixed, patchout=PatchoutConfig(time=0, frequency=0))
    run(replace(plain, model="ast_tiny", epochs=1, batch_size=8, log_every=1))
    torch.manual_seed(0)
    model = teacher.create_model("ast_tiny", num_classes=4)
    manifest = read_manifest(config.data)
    logits, _ = open_logits(store, manifest, config.cache_folder(), consistent_views=True)
    batch = open_clips(plain, manifest, model, logits)[np.arange(8)]
    with torch.no_grad():
        found = model(model.front_end(batch.padded(), lengths=batch.lengths))  # (clips, classes)
    soft = (batch.teacher_logits / 2).sigmoid()
    targets = torch.where(batch.has_teacher[:, None], 0.3 * batch.labels + 0.7 * soft, batch.labels)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(found, targets)
    assert batch.has_teacher.tolist() == [True] * 6 + [False] * 2
    assert read_metrics(tmp_path / "run")[0]["train/loss"] == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("model", ["passt_tiny", "ced_tiny"])
def test_a_transformer_taught_by_views_resumes_to_the_same_bits(
    config: TrainTeacherConfig, tmp_path: Path, model: str
) -> None:
    manifest, views = read_manifest(config.data), ViewsStamp(count=3, config=ViewConfig())
    stamp, folder = replace(stamp_for(manifest), views=views), str(tmp_path / "views")
    logits = np.random.default_rng(1).normal(0, 3, (24, 4)).astype(np.float16)
    write_stamp(folder, stamp)
    publish_part(folder, "train-000000", manifest.clip_ids.to_pylist(), logits, stamp, "")
    config = replace(config, store=folder, model=model, patchout=PatchoutConfig(time=1, frequency=0))
    weights = tmp_path / "run" / "last.safetensors"
    assert run(config).finished
    straight = load_file(weights)
    for path in list_checkpoints(tmp_path / "run")[2:]:
        path.unlink()
    assert run(replace(config, resume=True)).steps == 4
    assert all(torch.equal(tensor, straight[key]) for key, tensor in load_file(weights).items())
    run(replace(config, consistent_views=False, run=str(tmp_path / "other")))
    other = load_file(tmp_path / "other" / "last.safetensors")
    assert not all(torch.equal(tensor, other[key]) for key, tensor in straight.items())
