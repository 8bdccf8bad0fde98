from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.scoring.diagnostics import calibrate, clip_losses, precision_recall_curves
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.scoring import System, score

CLIPS, CLASSES = 40, 5


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(CLIPS, CLASSES, seconds=0.01))


def system_of(logits: np.ndarray) -> System:
    return System(name="by hand", source="", logits=logits.astype(np.float32), failures={})


@pytest.fixture
def guesses(data: Manifest) -> System:
    logits = np.random.default_rng(3).normal(size=(CLIPS, CLASSES)) + data.label_matrix(np.arange(CLIPS))
    return system_of(np.round(logits, 1))  # rounded, so that some are equal


def test_the_area_below_a_classs_steps_is_its_average_precision(data: Manifest, guesses: System) -> None:
    curves = precision_recall_curves(guesses, data, np.arange(CLIPS), max_points=CLIPS)
    wanted = score([guesses], data, max_failed=0, resampling=BootstrapConfig(bootstrap=0)).systems[0].average_precision
    for curve, area in zip(curves, wanted, strict=True):
        steps = np.diff(curve[:, 0], prepend=0)
        assert len(curve) == 0 if np.isnan(area) else np.isclose((steps * curve[:, 1]).sum(), area)


def test_a_long_curve_keeps_its_ends_and_no_more_points_than_asked_for(data: Manifest, guesses: System) -> None:
    rows = np.arange(CLIPS)
    whole = list(precision_recall_curves(guesses, data, rows, max_points=CLIPS))
    few = list(precision_recall_curves(guesses, data, rows, max_points=4))
    assert max(map(len, few)) == 4
    for long, short in zip(whole[:-1], few[:-1], strict=True):
        assert np.array_equal(short[[0, -1]], long[[0, -1]])


def test_probabilities_that_come_true_as_often_as_they_say_have_no_calibration_error(data: Manifest) -> None:
    shares = data.label_counts() / CLIPS
    with np.errstate(divide="ignore"):
        logits = np.log(shares / (1 - shares))
    honest = calibrate(system_of(np.tile(logits, (CLIPS, 1))), data, np.arange(CLIPS))
    assert honest.counts.sum() == CLIPS * CLASSES
    assert honest.error == pytest.approx(0, abs=1e-6)
    sure = calibrate(system_of(np.full((CLIPS, CLASSES), 9.0)), data, np.arange(CLIPS))
    assert sure.counts.tolist() == [0] * 9 + [CLIPS * CLASSES]
    assert sure.error == pytest.approx(1 - shares.mean(), abs=1e-3)


def test_only_the_rows_that_are_asked_for_count(data: Manifest, guesses: System) -> None:
    rows = np.array([1, 4, 9])
    assert calibrate(guesses, data, rows).counts.sum() == 3 * CLASSES
    assert np.array_equal(clip_losses(guesses, data, rows), clip_losses(guesses, data, np.arange(CLIPS))[rows])


def test_a_clips_loss_is_its_mean_cross_entropy_over_the_known_classes(data: Manifest, guesses: System) -> None:
    rows = np.arange(CLIPS)
    labels, probabilities = data.label_matrix(rows), 1 / (1 + np.exp(-guesses.logits))
    wanted = -np.log(np.where(labels > 0, probabilities, 1 - probabilities)).mean(axis=1)
    np.testing.assert_allclose(clip_losses(guesses, data, rows), wanted, rtol=1e-5)


def test_of_one_class_a_clip_the_loss_is_that_of_a_softmax(data: Manifest, guesses: System) -> None:
    rows = np.arange(CLIPS)
    found = clip_losses(replace(guesses, task="single-label"), data, rows)
    shares = np.exp(guesses.logits) / np.exp(guesses.logits).sum(axis=1, keepdims=True)
    labels = data.label_matrix(rows).astype(bool)
    for loss, share, label in zip(found, shares, labels, strict=True):
        assert np.isnan(loss) if not label.any() else np.isclose(loss, -np.log(share[label]).mean(), rtol=1e-4)
