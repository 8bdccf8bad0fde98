"""The metrics are scikit-learn's definitions, ties included."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision

from student.metrics import accuracy, average_precision, class_accuracy, d_prime, roc_auc, tagging_scores

scored_clips = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=25)


def brute_average_precision(scores, targets) -> float:
    """Sum the precision at every threshold times the recall gained there."""
    total, last_recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [target for score, target in zip(scores, targets, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(targets)
        total += (recall - last_recall) * sum(chosen) / len(chosen)
        last_recall = recall
    return total


def brute_roc_auc(scores, targets) -> float:
    """Count the pairs that are ranked rightly, ties half."""
    pairs = [
        (high > low) + (high == low) / 2
        for high, is_high in zip(scores, targets, strict=True)
        if is_high
        for low, is_low in zip(scores, targets, strict=True)
        if not is_low
    ]
    return sum(pairs) / len(pairs)


@settings(max_examples=300)
@given(scored_clips)
def test_equal_their_definitions_by_brute_force(clips) -> None:
    scores, targets = (list(column) for column in zip(*clips, strict=True))
    arrays = np.array(scores, np.float32), np.array(targets)
    if any(targets):
        assert average_precision(*arrays) == pytest.approx(brute_average_precision(scores, targets))
    else:
        assert math.isnan(average_precision(*arrays))
    if any(targets) and not all(targets):
        assert roc_auc(*arrays) == pytest.approx(brute_roc_auc(scores, targets))
    else:
        assert math.isnan(roc_auc(*arrays))


def test_equal_torchmetrics_on_many_classes() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((500, 30)) < 0.1
    scores = (rng.standard_normal((500, 30)) + targets).round(1).astype(np.float32)  # rounded: many ties
    ours = tagging_scores(scores, targets)
    predictions, truth = torch.from_numpy(scores).sigmoid(), torch.from_numpy(targets).long()
    theirs = multilabel_average_precision(predictions, truth, num_labels=30, average=None)
    areas = multilabel_auroc(predictions, truth, num_labels=30, average=None)
    np.testing.assert_allclose(ours.average_precision, theirs, atol=1e-6)
    np.testing.assert_allclose(ours.roc_auc, areas, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_some_rows_in_blocks_of_classes_score_like_those_rows_alone(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    targets = rng.random((200, 7)) < 0.2
    scores = (rng.standard_normal((200, 7)) + targets).astype(dtype)
    rows = np.flatnonzero(rng.random(200) < 0.7)
    alone = tagging_scores(scores[rows].astype(np.float64), targets[rows])
    scores[np.setdiff1d(np.arange(200), rows)] = np.nan  # what is not scored may be anything
    monkeypatch.setattr("student.metrics._BLOCK", 3 * len(rows))  # three classes, three, one
    some = tagging_scores(scores, targets.astype(np.uint8), rows)
    assert some.average_precision.tolist() == alone.average_precision.tolist()
    assert some.roc_auc.tolist() == alone.roc_auc.tolist()
    assert some.positives.tolist() == targets[rows].sum(axis=0).tolist()
    assert some.clips == len(rows)


def test_classes_without_positives_are_left_out_of_the_means_and_counted() -> None:
    targets = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1]])
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.2], [0.1, 0.2, 0.1]])
    result = tagging_scores(scores, targets)
    assert result.scored_classes == 2
    assert result.mean_average_precision == 1.0
    assert result.mean_roc_auc == 1.0
    assert result.positives.tolist() == [1, 0, 3]
    assert result.clips == 3
    assert np.isnan(result.average_precision[1])
    assert np.isnan(result.roc_auc[[1, 2]]).all()


def test_d_prime_is_the_distance_of_two_normal_classes() -> None:
    areas = np.array([0.5, 0.9, 0.97])
    expected = [math.sqrt(2) * statistics.NormalDist().inv_cdf(area) for area in areas]
    np.testing.assert_allclose(d_prime(areas), expected, atol=1e-9)
    assert d_prime(np.array([1.0]))[0] == math.inf


def test_no_scored_class_means_no_mean() -> None:
    result = tagging_scores(np.zeros((3, 2)), np.zeros((3, 2)))
    assert math.isnan(result.mean_average_precision)
    assert math.isnan(result.mean_d_prime)


@pytest.mark.parametrize(
    ("scores", "targets", "complaint"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), "aren't one"),
        (np.array([[np.nan]]), np.array([[1]]), "1 clips"),
        (np.zeros((1, 1)), np.array([[0.4]]), "neither 0 nor 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores, targets, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        tagging_scores(scores, targets)


def test_a_class_is_scored_on_the_clips_that_somebody_judged() -> None:
    rng = np.random.default_rng(1)
    targets, label_mask = rng.random((60, 5)) < 0.3, rng.random((60, 5)) < 0.5
    scores = rng.standard_normal((60, 5)).astype(np.float32)
    rows = np.flatnonzero(rng.random(60) < 0.8)
    found = tagging_scores(scores, targets, rows, label_mask=label_mask)
    for column in range(5):
        known = rows[label_mask[rows, column]]
        assert found.average_precision[column] == average_precision(scores[known, column], targets[known, column])
        assert found.roc_auc[column] == roc_auc(scores[known, column], targets[known, column])
    with pytest.raises(ValueError, match="label_mask"):
        tagging_scores(scores, targets, label_mask=label_mask[:, :4])


def test_accuracy_is_the_share_of_clips_whose_class_scores_highest() -> None:
    targets = np.eye(3)[[0, 0, 0, 1, 2]]
    scores = np.array([[3, 1, 2], [3, 1, 2], [1, 1, 2], [0, 1, 0], [5, 5, 5]], np.float32)
    assert accuracy(scores, targets) == 3 / 5  # of equal scores the first class counts
    assert class_accuracy(scores, targets) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert class_accuracy(scores[:4], targets[:4]) == pytest.approx((2 / 3 + 1) / 2)
    for wrong in (np.zeros((5, 3)), np.ones((5, 3))):
        with pytest.raises(ValueError, match="5 clips have no class or several"):
            accuracy(scores, wrong)
    with pytest.raises(ValueError, match="aren't one"):
        accuracy(scores, targets[:4])
