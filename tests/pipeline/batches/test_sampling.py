from itertools import islice, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import WeightedRandomSampler

from pipeline.batches.sampling import EpochSampler, StreamConfig, StreamSampler, epoch_order, grouped_reads, seed_for
from pipeline.errors import UsageError


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


def test_clips_are_drawn_as_often_as_by_upstream_s_sampler() -> None:
    weights = np.array([8.0, 4.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.1])
    epochs, drawn = 12_000, 4
    torch.manual_seed(0)
    sampler = WeightedRandomSampler(weights.tolist(), drawn, replacement=False)
    theirs = np.bincount([row for _ in range(epochs) for row in sampler], minlength=len(weights)) / epochs
    ours = np.zeros(len(weights))
    for epoch in range(epochs):
        ours[epoch_order(weights, drawn, seed=11, epoch=epoch)] += 1 / epochs
    shares = (ours + theirs) / 2
    deviations = (ours - theirs) / np.sqrt(2 * shares * (1 - shares) / epochs)
    # Nine deviations of standard normals: one is beyond 4 in fewer than one of a thousand seeds.
    assert np.abs(deviations).max() < 4


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
    sampler = EpochSampler(weights=np.ones(23), batch_size=5, seed=2)
    assert sampler.steps_per_epoch == 4
    running = list(islice(sampler.batches(), 11))
    for step, rows in enumerate(running):
        np.testing.assert_array_equal(sampler.batch_at(step), rows)
    np.testing.assert_array_equal(np.stack(list(sampler.batches(6, 11))), np.stack(running[6:]))
    assert [sampler.epoch_of(step) for step in (0, 3, 4, 10)] == [0, 0, 1, 2]


def test_uniform_epochs_see_every_clip_once() -> None:
    sampler = EpochSampler(weights=np.ones(12), batch_size=4, seed=2)
    for epoch in range(3):
        rows = np.concatenate(list(sampler.batches(3 * epoch, 3 * epoch + 3)))
        assert sorted(rows.tolist()) == list(range(12))


def test_epoch_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 8, but an epoch draws only 3 clips"):
        EpochSampler(weights=np.array([1.0, 1.0, 0.0, 1.0]), batch_size=8)


# Where the clips lie.


@given(st.integers(1, 60), st.integers(0, 80), st.integers(0, 2**32))
def test_grouped_reads_are_sorted_within_windows_and_move_no_clip_further(clips: int, window: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    order, numbers = random.permutation(100)[:clips], random.permutation(100)
    grouped = grouped_reads(order, numbers, window)
    assert sorted(grouped) == sorted(order)
    place = {row: index for index, row in enumerate(order.tolist())}
    assert all(abs(index - place[row]) < max(window, 1) for index, row in enumerate(grouped.tolist()))
    for start in range(0, clips, window) if window > 1 else ():
        assert (np.diff(numbers[grouped[start : start + window]]) > 0).all()


def test_a_read_window_changes_no_epoch_s_clips_and_every_step_can_still_be_computed_alone() -> None:
    weights = np.random.default_rng(0).random(200)
    numbers = np.random.default_rng(1).permutation(200)
    plain = EpochSampler(weights=weights, batch_size=7, clips_per_epoch=90, seed=5)
    grouped = EpochSampler(weights=weights, batch_size=7, clips_per_epoch=90, seed=5, numbers=numbers, read_window=30)
    for epoch in range(3):
        assert set(plain.order(epoch)) == set(grouped.order(epoch))
        assert plain.order(epoch).tolist() != grouped.order(epoch).tolist()
    running = list(grouped.batches(0, 24))
    for step in (0, 5, 12, 23):
        np.testing.assert_array_equal(grouped.batch_at(step), running[step])


def test_a_read_window_leaves_the_clips_of_a_batch_in_the_order_of_the_draws() -> None:
    weights, numbers = np.ones(60), np.arange(60)
    plain = EpochSampler(weights=weights, batch_size=6, seed=1)
    grouped = EpochSampler(weights=weights, batch_size=6, seed=1, numbers=numbers, read_window=30)
    turn = {row: index for index, row in enumerate(plain.order(0).tolist())}
    batches = grouped.order(0).reshape(-1, 6)
    assert all((np.diff([turn[row] for row in batch]) > 0).all() for batch in batches.tolist())
    assert any((np.diff(numbers[batch]) < 0).any() for batch in batches)  # so not in the order in which they lie
    assert all(np.ptp(numbers[batch]) < 40 for batch in batches[:5])


@st.composite
def stream_samplers(draw: st.DrawFn) -> StreamSampler:
    """Plans over up to 6 shards of 1 to 30 clips, rows in any order, for up to 5 ranks of up to 4 readers."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    clips = sum(sizes)
    weights = random.exponential(size=clips) * (random.random(clips) < 0.8)
    weights[0] = 1
    drawable = int((weights > 0).sum())
    return StreamSampler(
        weights=weights,
        batch_size=draw(st.integers(1, min(12, drawable))),
        clips_per_epoch=draw(st.none() | st.integers(12, 60)),
        seed=draw(st.integers(0, 99)),
        numbers=random.permutation(clips),
        shard_of_clip=np.repeat(np.arange(len(sizes)), sizes)[random.permutation(clips)],
        ranks=draw(st.integers(1, 5)),
        stream=StreamConfig(
            read_share=draw(st.sampled_from([1.0, 0.5, 0.3])),
            shuffle=draw(st.integers(0, 40)),
            readers=draw(st.integers(1, 4)),
        ),
    )


@settings(max_examples=200)
@given(stream_samplers(), st.integers(0, 5))
def test_streaming_draws_whole_batches_without_repeats_however_few_the_shards(
    sampler: StreamSampler, epoch: int
) -> None:
    order = sampler.order(epoch)
    assert len(order) == sampler.steps_per_epoch * sampler.batch_size == len(set(order.tolist()))
    assert (sampler.weights[order] > 0).all()
    if sampler.epochs_per_pass == 1:
        balanced = epoch_order(sampler.weights, len(order), seed=sampler.seed, epoch=epoch)
        assert set(order) == set(balanced)


@settings(max_examples=100)
@given(stream_samplers())
def test_a_reader_goes_through_the_shards_once_and_keeps_few_clips_waiting(sampler: StreamSampler) -> None:
    visits = sampler.visits(0)
    for shard in range(sampler.shard_of_clip.max() + 1):  # shard after shard, each from start to end
        turns = visits[sampler.shard_of_clip == shard]
        assert np.ptp(turns) == len(turns) - 1
        assert sampler.numbers is not None
        numbers = sampler.numbers[sampler.shard_of_clip == shard]
        assert (np.argsort(turns) == np.argsort(numbers)).all()
    batches = sampler.order(0).reshape(-1, sampler.batch_size)
    readers = sampler.reader_of(np.arange(len(batches)))
    last = -1
    for rank in range(sampler.ranks):
        for reader in range(sampler.stream.readers):
            own = visits[batches[readers == reader, sampler.positions_of(rank)].reshape(-1)]  # in the order of need
            if not len(own):
                continue
            assert own.min() > last  # what another has read is not read again
            last = own.max()
            read = np.maximum.accumulate(np.searchsorted(np.sort(own), own) + 1)
            assert (read - np.arange(len(own)) <= sampler.stream.shuffle / sampler.stream.readers + 1).all()


def test_epochs_of_a_pass_share_no_clip_and_every_pass_has_its_own_order_of_shards() -> None:
    sampler = StreamSampler(
        weights=np.ones(120),
        batch_size=10,
        clips_per_epoch=30,
        numbers=np.arange(120),
        shard_of_clip=np.arange(120) // 7,
        stream=StreamConfig(read_share=0.25, shuffle=0),
    )
    assert sampler.epochs_per_pass == 4
    assert sampler.discarded == 0
    seen = [set(sampler.order(epoch).tolist()) for epoch in range(8)]
    assert set.union(*seen[:4]) == set.union(*seen[4:]) == set(range(120))
    assert sampler.visits(0).tolist() == sampler.visits(3).tolist() != sampler.visits(4).tolist()


def test_more_than_an_epoch_needs_is_read_by_the_share_that_is_asked_for() -> None:
    sampler = StreamSampler(
        weights=np.ones(1000),
        batch_size=10,
        clips_per_epoch=50,
        numbers=np.arange(1000),
        shard_of_clip=np.zeros(1000, int),
    )
    assert sampler.discarded == pytest.approx(0.95)


def test_streaming_s_order_is_the_same_in_every_version_and_on_every_machine() -> None:
    sampler = StreamSampler(
        weights=np.arange(1.0, 13),
        batch_size=4,
        clips_per_epoch=8,
        numbers=np.arange(12),
        shard_of_clip=np.arange(12) // 3,
        stream=StreamConfig(shuffle=8, readers=2),
    )
    assert sampler.order(0).tolist() == [9, 10, 11, 3, 6, 4, 8, 7]


def test_senseless_settings_of_streaming_are_refused() -> None:
    for wrong in ({"read_share": 0.0}, {"read_share": 1.5}, {"shuffle": -1}, {"readers": 0}):
        with pytest.raises(UsageError, match="stream"):
            StreamConfig(**wrong)  # pyright: ignore[reportArgumentType]
