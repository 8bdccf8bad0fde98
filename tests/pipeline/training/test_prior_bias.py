"""An untrained model says of each class what is to be learned on average: labels, teachers, or both."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from made_stores import fill_store
from safetensors.torch import load_file

import student
import teacher
from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import UsageError
from pipeline.logits.alignment import AlignedLogits
from pipeline.training import prior_bias
from pipeline.training.prior_bias import label_shares, set_prior_bias, target_shares

CLIPS, CLASSES = 12, 4
STORED = np.random.default_rng(0).normal(-2, 3, (CLIPS, CLASSES)).astype(np.float16)
TAUGHT = np.arange(CLIPS) != 3
"""(clips,): which have logits."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Manifest:
    return read_manifest(make_dataset(tmp_path_factory.mktemp("data"), clips=CLIPS))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def aligned(logits: np.ndarray = STORED) -> AlignedLogits:
    return AlignedLogits(logits=logits, has_logits=TAUGHT, repeated=0, path=Path("unused"))


def with_half_a_clip(targets: np.ndarray) -> np.ndarray:
    """The mean of (clips, classes), one more clip with half of each class added."""
    return (targets.sum(axis=0) + 0.5) / (len(targets) + 1)


@pytest.mark.parametrize("build", [partial(student.create_model, "mn01"), partial(teacher.create_model, "passt_tiny")])
def test_silent_features_get_each_class_its_share(build: Callable[..., torch.nn.Module], manifest: Manifest) -> None:
    model = build(num_classes=CLASSES)
    set_prior_bias(model, label_shares(manifest))
    (bias,) = [bias for name, bias in model.get_classifier().named_parameters() if bias.shape == (CLASSES,)]  # pyright: ignore[reportCallIssue]
    expected = with_half_a_clip(manifest.label_matrix(np.arange(CLIPS)))
    np.testing.assert_allclose(bias.detach().sigmoid().numpy(), expected, rtol=1e-5)


def test_it_needs_a_bias_for_each_class(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="--prior-bias"):
        set_prior_bias(student.create_model("mn01", num_classes=3), label_shares(manifest))


@pytest.mark.parametrize("at_once", [5, 100])
def test_labels_and_teachers_share_the_target(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(prior_bias, "CLIPS_AT_ONCE", at_once)
    labels = manifest.label_matrix(np.arange(CLIPS))
    targets = np.where(TAUGHT[:, None], 0.2 * labels + 0.8 * sigmoid(STORED / 2), labels)
    found = target_shares(manifest, aligned(), student.DistillConfig(teacher_weight=0.8, temperature=2.0))
    np.testing.assert_allclose(found, with_half_a_clip(targets), rtol=1e-5)


def test_without_any_label_it_is_what_the_teachers_say_in_all_views(manifest: Manifest) -> None:
    unlabelled, config = manifest.with_label_share(0.0), student.DistillConfig()
    found = target_shares(unlabelled, aligned(), config)
    np.testing.assert_allclose(found, with_half_a_clip(sigmoid(STORED)[TAUGHT]), rtol=1e-5)
    views = np.stack([STORED, -STORED], axis=1)  # (clips, views, classes)
    found = target_shares(unlabelled, aligned(views), config)
    np.testing.assert_allclose(found, np.full(CLASSES, 0.5), rtol=1e-3)


def test_a_run_starts_there(manifest: Manifest, tmp_path: Path) -> None:
    fill_store(tmp_path / "store", manifest, STORED)
    config = TrainStudentConfig(
        data=manifest.location,
        run=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        model="mn01",
        model_options={"n_mels": 40, "hopsize": 1600},
        label_share=0.0,
        prior_bias=True,
        epochs=1,
        batch_size=4,
        learning_rate=1e-30,
        workers=0,
        device="cpu",
    )
    run(replace(config, store=str(tmp_path / "store")))
    bias = load_file(tmp_path / "run" / "last.safetensors")["classifier.5.bias"]
    np.testing.assert_allclose(bias.sigmoid().numpy(), with_half_a_clip(sigmoid(STORED)), rtol=1e-5)
    assert not math.isclose(float(bias[0]), 0.0)
