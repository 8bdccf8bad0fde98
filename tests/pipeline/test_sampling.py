from itertools import islice, permutations

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.sampling import EpochPlan, epoch_order, seed_for


def sequence_probability(draws: tuple[int, ...], weights: np.ndarray) -> float:
    """Probability that drawing one clip after the other, by weight among those left, gives `draws`."""
    left, probability = weights.sum(), 1.0
    for row in draws:
        probability *= weights[row] / left
        left -= weights[row]
    return probability


def test_orders_occur_as_often_as_sequential_weighted_draws_say() -> None:
    weights = np.array([5.0, 1.0, 0.0, 2.0, 0.5])
    epochs, orders = 20_000, list(permutations([0, 1, 3, 4], 3))
    expected = epochs * np.array([sequence_probability(order, weights) for order in orders])
    seen = dict.fromkeys(orders, 0)
    for epoch in range(epochs):
        seen[tuple(epoch_order(weights, 3, seed=7, epoch=epoch).tolist())] += 1
    chi_square = ((np.array(list(seen.values())) - expected) ** 2 / expected).sum()
    assert chi_square < 49.7  # 23 degrees of freedom: a right sampler exceeds this once in a thousand seeds


def test_an_epoch_never_repeats_a_clip_and_never_draws_weight_zero() -> None:
    weights = np.random.default_rng(0).random(1000) * (np.arange(1000) % 3 > 0)
    order = epoch_order(weights, 600, seed=1, epoch=2)
    assert len(set(order.tolist())) == 600
    assert (weights[order] > 0).all()


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    weights = np.ones(50)
    first = epoch_order(weights, 20, seed=3, epoch=4)
    np.random.default_rng().random(10)
    np.testing.assert_array_equal(first, epoch_order(weights, 20, seed=3, epoch=4))
    assert not np.array_equal(first, epoch_order(weights, 20, seed=4, epoch=3))
    assert not np.array_equal(first, epoch_order(weights, 20, seed=3, epoch=5))


def test_order_is_the_same_in_every_version_and_on_every_machine() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert epoch_order(weights, 8, seed=0, epoch=0).tolist() == [7, 6, 4, 3, 5, 1, 2, 0]
    assert seed_for(0, 1, 2) == 1535930435702422785


def test_drawing_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 clips .* from 2"):
        epoch_order(np.array([1.0, 0.0, 1.0]), 3, seed=0, epoch=0)


def test_any_step_can_be_computed_alone() -> None:
    plan = EpochPlan(weights=np.ones(23), batch_size=5, seed=2)
    assert plan.steps_per_epoch == 4
    running = list(islice(plan.batches(), 11))
    for step, rows in enumerate(running):
        np.testing.assert_array_equal(plan.batch_at(step), rows)
    np.testing.assert_array_equal(np.stack(list(plan.batches(6, 11))), np.stack(running[6:]))
    assert [plan.epoch_of(step) for step in (0, 3, 4, 10)] == [0, 0, 1, 2]


def test_uniform_epochs_see_every_clip_once() -> None:
    plan = EpochPlan(weights=np.ones(12), batch_size=4, seed=2)
    for epoch in range(3):
        rows = np.concatenate(list(plan.batches(3 * epoch, 3 * epoch + 3)))
        assert sorted(rows.tolist()) == list(range(12))


def test_epoch_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 8, but an epoch draws only 3 clips"):
        EpochPlan(weights=np.array([1.0, 1.0, 0.0, 1.0]), batch_size=8)
