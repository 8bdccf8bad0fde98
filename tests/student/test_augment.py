"""Augmentations change what they say, repeat with their generator, and are off by default."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.augment import MASKED, AugmentConfig, augment_features, augment_waveforms, gain, mask, roll
from student.randomness import Randomness

ALL_ON = AugmentConfig(roll_samples=50, gain_db=6, mask_mels=8, mask_frames=12)


def randomness(clips: int, seed: int = 0) -> Randomness:
    return Randomness.of_batch(clips, torch.Generator().manual_seed(seed))


def test_everything_is_off_by_default() -> None:
    waveforms, features = torch.randn(2, 100), torch.randn(2, 1, 16, 20)
    source = randomness(2)
    state = source.generator.get_state()
    assert torch.equal(augment_waveforms(waveforms, AugmentConfig(), source), waveforms)
    assert torch.equal(augment_features(features, AugmentConfig(), source), features)
    assert torch.equal(source.generator.get_state(), state)


def test_one_generator_state_gives_one_augmentation_and_inputs_stay() -> None:
    waveforms, features = torch.randn(4, 1000), torch.randn(4, 1, 16, 20)
    before = waveforms.clone(), features.clone()
    for augment, rows in ((augment_waveforms, waveforms), (augment_features, features)):
        first, again, other = (augment(rows, ALL_ON, randomness(4, seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(waveforms, before[0])
    assert torch.equal(features, before[1])


def test_a_part_of_a_batch_is_augmented_as_the_whole_batch_is() -> None:
    waveforms, features = torch.randn(6, 1000), torch.randn(6, 1, 16, 20)
    places = torch.tensor([1, 4, 5])
    part = Randomness(torch.Generator().manual_seed(2), places, 6)
    whole = randomness(6, 2)
    assert torch.equal(
        augment_waveforms(waveforms[places], ALL_ON, part), augment_waveforms(waveforms, ALL_ON, whole)[places]
    )
    assert torch.equal(
        augment_features(features[places], ALL_ON, part), augment_features(features, ALL_ON, whole)[places]
    )


def test_rolling_moves_each_clip_by_its_own_shift_within_the_range() -> None:
    waveforms = torch.zeros(2000, 100)
    waveforms[:, 50] = 1
    places = roll(waveforms, 3, randomness(2000)).argmax(dim=1)
    assert set(places.tolist()) == set(range(47, 54))


def test_gain_stays_within_its_decibels() -> None:
    decibels = 20 * gain(torch.ones(5000, 1), 6.0, randomness(5000)).log10()
    assert decibels.abs().max() <= 6.0001
    assert decibels.min() < -5.9
    assert decibels.max() > 5.9


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(1, 40), dim=st.sampled_from([2, 3]))
def test_a_mask_hides_one_run_along_its_axis(seed, most, dim) -> None:
    features = torch.randn(3, 1, 16, 20)
    masked = mask(features, most, randomness(3, seed), dim=dim)
    changed = (masked != features).any(dim=5 - dim).squeeze(1)  # (batch, places along the axis)
    for clip, places in enumerate(changed):
        hidden = places.nonzero().flatten().tolist()
        assert len(hidden) <= min(most, features.shape[dim])
        assert hidden == list(range(min(hidden, default=0), max(hidden, default=-1) + 1))
        assert (masked[clip].movedim(dim - 1, 0)[places] == MASKED).all()


def test_negative_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="augment"):
        AugmentConfig(gain_db=-1)


def test_short_clips_are_rolled_and_masked_within_their_own_lengths() -> None:
    lengths = torch.tensor([40, 1000])
    waveforms = torch.randn(2, 1000).masked_fill(torch.arange(1000) >= lengths[:, None], 0.0)
    rolled = roll(waveforms, 30, randomness(2, 1), lengths)
    assert not torch.equal(rolled[0], waveforms[0])
    assert torch.equal(rolled[0, :40].sort().values, waveforms[0, :40].sort().values)
    assert not rolled[0, 40:].any()
    frames, features = torch.tensor([5, 400]), torch.randn(2, 1, 16, 400)
    config = AugmentConfig(mask_frames=300)
    for seed in range(20):
        masked = augment_features(features, config, randomness(2, seed), frames)
        assert torch.equal(masked[0, :, :, 5:], features[0, :, :, 5:])
        longer = augment_features(torch.nn.functional.pad(features, (0, 50)), config, randomness(2, seed), frames)
        assert torch.equal(longer[..., :400], masked)  # whatever room there is behind the clips
