"""Mixup: one generator state is one mix; sounds and targets are mixed alike."""

import pytest
import torch

from student.mixup import Mix, MixupConfig, draw_mix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_generator_state_gives_one_mix() -> None:
    first, again, other = (draw_mix(16, MixupConfig(), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.partner, again.partner)
    assert torch.equal(first.share, again.share)
    assert not torch.equal(first.share, other.share)


def test_the_global_generators_are_left_alone() -> None:
    state = torch.random.get_rng_state()
    draw_mix(16, MixupConfig(), generator())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_clip_is_somebodys_partner_and_keeps_the_larger_share() -> None:
    mix = draw_mix(1000, MixupConfig(), generator())
    assert sorted(mix.partner.tolist()) == list(range(1000))
    assert mix.share.min() >= 0.5
    assert mix.share.max() <= 1.0


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_shares_follow_the_folded_beta_distribution(alpha) -> None:
    shares = draw_mix(200_000, MixupConfig(alpha=alpha), generator()).share
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
        share = mix.share[row]
        torch.testing.assert_close(mixed[row], share * rows[row] + (1 - share) * rows[mix.partner[row]])


def test_alpha_zero_mixes_nothing() -> None:
    rows = torch.randn(5, 3)
    assert torch.equal(draw_mix(5, MixupConfig(alpha=0), generator()).of(rows), rows)


def test_negative_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha"):
        MixupConfig(alpha=-1)
