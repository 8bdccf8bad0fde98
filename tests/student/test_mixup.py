"""Mixup: one generator state is one mix; sounds and targets are mixed alike."""

import pytest
import torch

from student.mixup import Mix, MixupConfig, draw_mix
from student.randomness import Randomness


def randomness(clips: int, seed: int = 0) -> Randomness:
    return Randomness.of_batch(clips, torch.Generator().manual_seed(seed))


def test_one_generator_state_gives_one_mix() -> None:
    first, again, other = (draw_mix(randomness(16, seed), MixupConfig()) for seed in (3, 3, 4))
    assert torch.equal(first.lam, again.lam)
    assert not torch.equal(first.lam, other.lam)


def test_the_global_generators_are_left_alone() -> None:
    state = torch.random.get_rng_state()
    draw_mix(randomness(16), MixupConfig())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_clip_is_somebodys_partner_and_keeps_the_larger_share() -> None:
    mix = draw_mix(randomness(1000), MixupConfig())
    assert sorted(mix.partner.tolist()) == list(range(1000))
    assert (mix.partner != torch.arange(1000)).all()
    assert torch.equal(mix.partner[mix.partner], torch.arange(1000))
    assert mix.lam.min() >= 0.5
    assert mix.lam.max() <= 1.0


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_shares_follow_the_folded_beta_distribution(alpha) -> None:
    shares = draw_mix(randomness(200_000), MixupConfig(alpha=alpha)).lam
    reference = torch.distributions.Beta(alpha, alpha).sample((200_000,))
    reference = torch.maximum(reference, 1 - reference)
    for quantile in (0.1, 0.25, 0.5, 0.75):
        assert shares.quantile(quantile).item() == pytest.approx(reference.quantile(quantile).item(), abs=0.01)


@pytest.mark.parametrize("shape", [(4, 100), (4, 1, 8, 10), (4, 527)])
def test_waveforms_spectrograms_and_targets_are_mixed_alike(shape) -> None:
    rows = torch.randn(shape)
    mix = Mix(torch.tensor([2, 0, 1, 3]), torch.tensor([0.9, 0.5, 1.0, 0.7]))
    mixed = mix.of(rows)
    for row in range(4):
        share = mix.lam[row]
        torch.testing.assert_close(mixed[row], share * rows[row] + (1 - share) * rows[mix.partner[row]])


def test_a_part_of_a_batch_is_mixed_as_the_whole_batch_is() -> None:
    rows, whole = torch.randn(7, 3), draw_mix(randomness(7, 5), MixupConfig())
    for places in (range(4), range(4, 7)):
        part = Randomness(torch.Generator().manual_seed(5), torch.tensor(places), 7)
        assert torch.equal(draw_mix(part, MixupConfig()).of(rows[places]), whole.of(rows)[places])


def test_a_clip_whose_partner_is_missing_stays_as_it_is() -> None:
    there = Randomness(torch.Generator().manual_seed(5), torch.tensor([0, 1, 3, 6]), 7)
    rows, mix = torch.randn(4, 3), draw_mix(there, MixupConfig())
    assert mix.partner.tolist() == [1, 0, 2, 3]
    assert mix.lam[2:].tolist() == [1, 1]
    assert torch.equal(mix.of(rows)[2:], rows[2:])


def test_a_rate_below_one_leaves_the_rest_unmixed() -> None:
    share = draw_mix(randomness(10_000), MixupConfig(alpha=2.0, rate=0.3)).lam
    assert (share < 1).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_waveforms_lose_their_mean_where_they_are_mixed() -> None:
    waveforms = torch.randn(3, 100) + torch.tensor([[0.5], [2.0], [-1.0]])
    mix = Mix(torch.tensor([1, 0, 2]), torch.tensor([0.75, 0.5, 1.0]))
    mixed = mix.of_waveforms(waveforms)
    centred = waveforms - waveforms.mean(dim=1, keepdim=True)
    torch.testing.assert_close(mixed[0], 0.75 * centred[0] + 0.25 * centred[1])
    torch.testing.assert_close(mixed.mean(dim=1), torch.tensor([0.0, 0.0, -1.0]), atol=0.3, rtol=0)
    assert torch.equal(mixed[2], waveforms[2])


def test_alpha_zero_mixes_nothing() -> None:
    rows = torch.randn(5, 3)
    assert torch.equal(draw_mix(randomness(5), MixupConfig(alpha=0)).of(rows), rows)


@pytest.mark.parametrize(("name", "value"), [("alpha", -1), ("rate", 1.5)])
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        MixupConfig(**{name: value})  # pyright: ignore[reportArgumentType]


def test_clips_that_are_mixed_twice_meet_two_others() -> None:
    near, far = (draw_mix(randomness(8), MixupConfig(), distance=distance).partner.tolist() for distance in (1, 2))
    assert (near, far) == ([1, 0, 3, 2, 5, 4, 7, 6], [2, 3, 0, 1, 6, 7, 4, 5])
    odd = draw_mix(randomness(7), MixupConfig(), distance=2)  # 5 would meet 7
    assert (odd.partner[5], odd.lam[5]) == (5, 1.0)


def test_sounds_of_unlike_lengths_are_mixed_within_their_own() -> None:
    lengths = torch.tensor([3, 5, 2])
    waveforms = torch.tensor([[1.0, 2, 3, 0, 0], [4, 4, 4, 4, 9], [7, 8, 0, 0, 0]])
    mix = Mix(torch.tensor([1, 0, 2]), torch.tensor([0.75, 0.75, 1.0]))
    first, second = torch.tensor([-1.0, 0, 1, 0, 0]), torch.tensor([-1.0, -1, -1, -1, 4])  # without their means
    expected = torch.stack([0.75 * first + 0.25 * second, 0.75 * second + 0.25 * first, waveforms[2]])
    torch.testing.assert_close(mix.of_waveforms(waveforms, lengths), expected)
    assert mix.of_lengths(lengths).tolist() == [5, 5, 2]
