"""The front end equals EfficientAT's, in evaluation and in its training-time jitter."""

from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from student.front_end import FrontEndConfig, LogMelFrontEnd, front_end_config, mel_filters, mel_groups


def kaldi_bank(config: FrontEndConfig, low_hz: float, high_hz: float) -> torch.Tensor:
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(
        config.mels, config.fft_samples, config.sample_rate_hz, low_hz, high_hz, 100.0, -500.0, 1.0
    )
    return torch.nn.functional.pad(bank, (0, 1))


@pytest.mark.parametrize(("seconds", "array"), [(10, "mel_10s"), (4.3, "mel_4s3")])
def test_equals_the_reference_log_mels(golden_dir, fill, seconds, array) -> None:
    golden = np.load(golden_dir / "mn10.npz")[array]
    sounds = torch.stack([torch.from_numpy(fill.waveform(seconds, 32_000, seed)) for seed in range(len(golden))])
    front_end = LogMelFrontEnd().eval()
    features = front_end(sounds)
    assert features.shape == (len(golden), 1, 128, front_end.config.frames(sounds.shape[1]))
    torch.testing.assert_close(features[:, 0], torch.from_numpy(golden), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    low_hz=st.integers(0, 9),
    high_hz=st.integers(14_001, 16_000),
    mels=st.sampled_from([40, 64, 128, 256]),
)
def test_the_bank_equals_torchaudios_kaldi_bank(low_hz, high_hz, mels) -> None:
    config = FrontEndConfig(mels=mels)
    torch.testing.assert_close(
        mel_filters(config, low_hz, high_hz), kaldi_bank(config, low_hz, high_hz), atol=1e-6, rtol=0
    )


def test_training_jitters_both_edges_over_upstreams_ranges(monkeypatch) -> None:
    edges = []
    monkeypatch.setattr(
        "student.front_end.mel_filters",
        lambda config, low, high, device=None: edges.append((low, high)) or torch.zeros(4, 513),
    )
    front_end = LogMelFrontEnd(FrontEndConfig(mels=4)).train()
    edges.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20_000):
        front_end._jittered_filters(generator)
    lows, highs = (set(column) for column in zip(*edges, strict=True))
    assert lows == set(range(10))
    assert (min(highs), max(highs)) == (14_001, 16_000)


def test_one_generator_state_gives_one_jitter_and_evaluation_has_none() -> None:
    sounds = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(1)) / 10
    front_end = LogMelFrontEnd()
    draws = [front_end(sounds, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    front_end.eval()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert torch.equal(front_end(sounds, generator=generator), front_end(sounds))
    assert torch.equal(generator.get_state(), state)


def test_jitter_does_not_touch_the_global_generator_when_handed_one() -> None:
    state = torch.random.get_rng_state()
    LogMelFrontEnd()(torch.zeros(1, 2_000), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_stays_in_float32_under_autocast_and_after_half() -> None:
    sounds = torch.randn(1, 8_000) / 10
    front_end = LogMelFrontEnd().eval()
    expected = front_end(sounds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(front_end(sounds), expected)
    assert torch.equal(front_end.to(torch.bfloat16)(sounds), expected)


def test_a_model_on_no_memory_gets_its_constants_when_it_gets_memory() -> None:
    with torch.device("meta"):
        front_end = LogMelFrontEnd().eval()
    sounds = torch.randn(1, 8_000) / 10
    assert torch.equal(front_end.to_empty(device="cpu")(sounds), LogMelFrontEnd().eval()(sounds))


def test_checkpoints_hold_nothing_of_the_front_end() -> None:
    assert LogMelFrontEnd().state_dict() == {}


@pytest.mark.parametrize(("hop", "frames"), [(160, 2000), (320, 1000), (480, 667), (640, 500), (800, 400)])
def test_counts_its_frames(hop, frames) -> None:
    assert FrontEndConfig(hop_samples=hop).frames(320_000) == frames


@pytest.mark.parametrize("shape", [(32_000,), (1, 1, 32_000), (2, 513)])
def test_refuses_what_it_cannot_see(shape) -> None:
    with pytest.raises(ValueError, match="takes \\(batch, samples\\)"):
        LogMelFrontEnd()(torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [{"mels": 3}, {"hop_samples": 0}, {"window_samples": 2000}, {"high_hz": 15_500.0}, {"low_jitter_hz": 0}],
)
def test_refuses_settings_that_make_no_bank(wrong) -> None:
    with pytest.raises(ValueError, match="front end"):
        FrontEndConfig(**wrong)


@pytest.mark.parametrize("training", [True, False])
def test_clips_can_have_edges_of_their_own_and_then_nothing_is_drawn(training: bool) -> None:
    sounds = torch.randn(3, 8_000, generator=torch.Generator().manual_seed(1)) / 10
    front_end = LogMelFrontEnd().train(training)
    shifts = torch.tensor([[0, 0], [9, -999], [3, 5_000]])  # the last one stops at half the sampling rate
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    features = front_end(sounds, generator, shifts)
    assert torch.equal(generator.get_state(), before)
    for sound, (low_hz, high_hz), found in zip(sounds, [(0, 15_000), (9, 14_001), (3, 16_000)], features, strict=True):
        alone = LogMelFrontEnd(FrontEndConfig(low_hz=low_hz, high_hz=high_hz, low_jitter_hz=1, high_jitter_hz=1)).eval()
        torch.testing.assert_close(found, alone(sound[None])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        FrontEndConfig(),
        FrontEndConfig(mels=40),
        FrontEndConfig(mels=256),
        FrontEndConfig(mels=23, fft_samples=512, window_samples=400, low_hz=50, high_hz=7000, low_jitter_hz=100),
        FrontEndConfig(sample_rate_hz=16_000, high_hz=7_900, high_jitter_hz=1),
    ],
)
def test_no_band_reaches_beyond_the_bins_of_its_group(config) -> None:
    groups = mel_groups(config)
    assert [mel for mels, _ in groups for mel in range(mels.start, mels.stop)] == list(range(config.mels))
    top = config.high_hz + config.high_jitter_hz // 2
    for low_hz in (config.low_hz, config.low_hz + config.low_jitter_hz - 1):
        for high_hz in (top, config.high_hz, top - config.high_jitter_hz + 1):
            bank = mel_filters(config, low_hz, high_hz)
            for mels, bins in groups:
                bank[mels, bins] = 0
            assert not bank.any()


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, FrontEndConfig()),
        ({"resample_rate": 16_000}, FrontEndConfig(sample_rate_hz=16_000, high_hz=7_000.0)),
        (
            {"fmax_aug_range": 1, "fmin_aug_range": 1},
            FrontEndConfig(high_hz=16_000.0, low_jitter_hz=1, high_jitter_hz=1),
        ),
        (
            {"n_mels": 64, "hopsize": 160, "window_size": 400, "n_fft": 512, "fmin": 50, "fmax": 14_000},
            FrontEndConfig(
                mels=64, hop_samples=160, window_samples=400, fft_samples=512, low_hz=50.0, high_hz=14_000.0
            ),
        ),
    ],
)
def test_upstreams_keywords_describe_a_front_end(keywords: dict[str, Any], expected: FrontEndConfig) -> None:
    assert front_end_config(**keywords) == expected


def test_a_keyword_that_nobody_takes_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"hop_length: no setting of the network, nor of its front end \(n_mels, hopsize"
    ):
        front_end_config(hop_length=1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "keywords",
    [
        {"resample_rate": 16_000, "window_size": 400, "hopsize": 160, "n_fft": 512, "n_mels": 64},
        {"fmin": 300.0, "fmax": 9_000.0, "n_fft": 2048, "window_size": 1600},
        {"fmin_aug_range": 1, "fmax_aug_range": 1},
        {"resample_rate": 8_000, "fmax_aug_range": 500, "n_mels": 40},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_front_ends_of_other_settings_hear_as_upstreams(keywords: dict[str, Any], training: bool) -> None:
    """Upstream's steps in its words: pre-emphasis, power, Kaldi's triangles, logarithm."""
    config = front_end_config(**keywords)
    front_end = LogMelFrontEnd(config).train(training)
    sound = 0.3 * torch.randn(2, config.sample_rate_hz, generator=torch.Generator().manual_seed(0))
    found = front_end(sound, torch.Generator().manual_seed(5))[:, 0]

    generator = torch.Generator().manual_seed(5)
    rise, fall = (
        int(torch.randint(width, (), generator=generator)) for width in (config.low_jitter_hz, config.high_jitter_hz)
    )
    low = config.low_hz + (rise if training else 0)
    high = config.high_hz + (config.high_jitter_hz // 2 - fall if training else 0)
    emphasised = torch.nn.functional.conv1d(sound[:, None], torch.tensor([[[-0.97, 1.0]]]))[:, 0]
    window = torch.hann_window(config.window_samples, periodic=False)
    spectrum = torch.stft(
        emphasised, config.fft_samples, config.hop_samples, config.window_samples, window, return_complex=True
    )
    bands = kaldi_bank(config, low, high) @ spectrum.abs().square()
    torch.testing.assert_close(found, ((bands + 1e-5).log() + 4.5) / 5, rtol=1e-4, atol=1e-4)
