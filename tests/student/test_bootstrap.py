"""Replicates equal what scoring resampled clips one after the other gives."""

import numpy as np
import pytest

from student import bootstrap_mean_average_precision, tagging_scores


def plain(scores, targets, rows, label_mask, *, replicates: int, seed: int) -> list[float]:
    """Resample the clips and score them anew, replicate by replicate."""
    found = []
    for number in range(replicates):
        drawn = rows[np.random.default_rng([seed, number]).integers(len(rows), size=len(rows))]
        mask = None if label_mask is None else label_mask[drawn]
        found.append(tagging_scores(scores[drawn], targets[drawn], label_mask=mask).mean_average_precision)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_plain_resampling(dtype, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((90, 7)) < [0.3, 0.02, 0, 1, 0.1, 0.05, 0.2]  # a class of no clip, a class of all
    scores = (rng.standard_normal((90, 7)) + targets).round(1).astype(dtype)  # rounded: many ties
    rows = np.flatnonzero(rng.random(90) < 0.8)
    scores[np.setdiff1d(np.arange(90), rows)] = np.nan  # what is not scored may be anything
    mask = rng.random((90, 7)) < 0.6 if masked else None
    monkeypatch.setattr("student.bootstrap._RANKS_AT_ONCE", 3 * len(rows))  # three classes, three, one
    monkeypatch.setattr("student.bootstrap._WEIGHTS_AT_ONCE", 4 * len(rows))  # four replicates at a time
    done: list[int] = []
    found = bootstrap_mean_average_precision(
        scores, targets, rows, label_mask=mask, replicates=30, seed=5, advance=done.append
    )
    wanted = plain(scores, targets, rows, mask, replicates=30, seed=5)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert np.ptp(found) > 0.01
    assert sum(done) == 7


def test_a_replicate_does_not_depend_on_how_many_there_are() -> None:
    rng = np.random.default_rng(1)
    scores, targets = rng.standard_normal((40, 3)), rng.random((40, 3)) < 0.3
    many = bootstrap_mean_average_precision(scores, targets, replicates=9, seed=2)
    few = bootstrap_mean_average_precision(scores, targets, replicates=4, seed=2)
    other = bootstrap_mean_average_precision(scores, targets, replicates=9, seed=3)
    np.testing.assert_allclose(many[:4], few, rtol=1e-12)
    assert many.tolist() != other.tolist()


def test_a_replicate_without_a_positive_clip_has_no_score() -> None:
    targets = np.zeros((8, 2))
    targets[0, 0] = 1
    found = bootstrap_mean_average_precision(np.arange(16.0).reshape(8, 2), targets, replicates=50)
    drawn = [0 in np.random.default_rng([0, number]).integers(8, size=8) for number in range(50)]
    assert np.isnan(found).tolist() == [not there for there in drawn]
    assert not all(drawn)
    assert np.isnan(bootstrap_mean_average_precision(np.zeros((8, 2)), np.zeros((8, 2)), replicates=2)).all()


def test_nothing_is_resampled_where_no_replicates_are_asked_for() -> None:
    assert bootstrap_mean_average_precision(np.zeros((4, 2)), np.ones((4, 2)), replicates=0).tolist() == []
