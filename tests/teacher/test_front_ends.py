from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.compliance.kaldi import get_mel_banks

from student.front_end import LogMelFrontEnd
from teacher import front_ends
from teacher.front_ends import (
    DecibelMelConfig,
    FrontEndConfig,
    KaldiFbankConfig,
    PasstMel,
    PasstMelConfig,
    build_front_end,
)

CONFIGS = [PasstMelConfig(), KaldiFbankConfig(), DecibelMelConfig()]
every_front_end = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


@pytest.mark.parametrize("samples", [512, 16000, 68813, 160000, 200000])
@pytest.mark.parametrize("subtract_mean", [True, False])
def test_fbank_of_a_batch_equals_torchaudio_clip_by_clip(samples: int, subtract_mean: bool) -> None:
    waveforms = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(samples)) + 0.05
    config = KaldiFbankConfig(subtract_mean=subtract_mean)
    ours = build_front_end(config)(waveforms)
    assert ours.shape == (3, 1024, 128)
    for clip, features in zip(waveforms, ours, strict=True):
        centred = clip - clip.mean() if subtract_mean else clip
        theirs = kaldi.fbank(
            centred[None], sample_frequency=16000, window_type="hanning", num_mel_bins=128, htk_compat=True
        )
        padded = torch.nn.functional.pad(theirs[:1024], (0, 0, 0, max(0, 1024 - len(theirs))))
        torch.testing.assert_close(features, (padded + 4.2677393) / (2 * 4.5689974), rtol=1e-4, atol=1e-5)


def test_fbank_equals_hugging_faces_feature_extractor(clips: Callable[..., Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    waveforms = clips(16000)
    theirs = transformers.ASTFeatureExtractor()(
        [np.asarray(clip) for clip in waveforms], sampling_rate=16000, return_tensors="pt"
    )
    ours = build_front_end(KaldiFbankConfig(subtract_mean=False))(waveforms)
    torch.testing.assert_close(ours, theirs["input_values"], rtol=1e-4, atol=1e-5)


def test_decibels_equal_torchaudios(clips: Callable[..., Tensor]) -> None:
    waveforms = clips(16000)
    mel = torchaudio.transforms.MelSpectrogram(f_max=8000, win_length=512, n_fft=512, hop_length=160, n_mels=64)
    theirs = torchaudio.transforms.AmplitudeToDB(top_db=120)(mel(waveforms[:1]))
    torch.testing.assert_close(build_front_end(DecibelMelConfig())(waveforms)[:1], theirs, rtol=1e-4, atol=1e-4)


def test_passt_mel_equals_hear21passts(clips: Callable[..., Tensor]) -> None:
    preprocess = pytest.importorskip("hear21passt.models.preprocess", reason="hear21passt is not installed")
    for hop in (100, 160, 320):
        theirs = preprocess.AugmentMelSTFT(hopsize=hop, fmin_aug_range=10, fmax_aug_range=2000).eval()
        ours = build_front_end(PasstMelConfig(hop_samples=hop)).eval()
        waveforms = clips(32000, 2.0)
        torch.testing.assert_close(ours(waveforms), theirs(waveforms), rtol=1e-4, atol=1e-5)


def test_band_edges_move_in_training_mode_as_the_generator_says(clips: Callable[..., Tensor]) -> None:
    front_end, waveforms = build_front_end(PasstMelConfig()), clips(32000, 0.5)
    moved = [front_end(waveforms, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert not torch.equal(moved[0], front_end.eval()(waveforms))


def test_band_edges_stay_within_their_ranges(clips: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    front_end, edges = PasstMel(PasstMelConfig()), []
    whole = front_end._filters
    monkeypatch.setattr(front_end, "_filters", lambda low, high: edges.append((low, high)) or whole(low, high))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        front_end(clips(32000, 0.1), generator)
    lowest, highest = np.array(edges).T
    assert set(lowest) == set(range(10))
    assert 14001 <= highest.min() < 14200
    assert 15800 < highest.max() <= 16000


@every_front_end
def test_evaluation_draws_nothing(config: FrontEndConfig, clips: Callable[..., Tensor]) -> None:
    front_end, waveforms = build_front_end(config).eval(), clips(config.sample_rate_hz, 0.5)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(front_end(waveforms, generator), front_end(waveforms))
    assert torch.equal(generator.get_state(), before)


@every_front_end
def test_arithmetic_stays_in_float32(config: FrontEndConfig, clips: Callable[..., Tensor]) -> None:
    front_end, waveforms = build_front_end(config).eval(), clips(config.sample_rate_hz, 0.5)
    expected = front_end(waveforms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(front_end(waveforms), expected)
    assert torch.equal(front_end.bfloat16()(waveforms), expected)


@every_front_end
def test_a_clip_does_not_depend_on_its_neighbours(config: FrontEndConfig, clips: Callable[..., Tensor]) -> None:
    front_end, waveforms = build_front_end(config).eval(), clips(config.sample_rate_hz, 0.5)
    quiet = torch.cat([1e-6 * waveforms[:1], 5 * waveforms[1:]])
    torch.testing.assert_close(front_end(quiet)[:1], front_end(quiet[:1]), rtol=0, atol=1e-5)


@every_front_end
def test_silence_gives_finite_features(config: FrontEndConfig) -> None:
    assert build_front_end(config)(torch.zeros(1, config.sample_rate_hz)).isfinite().all()


@every_front_end
@pytest.mark.parametrize("shape", [(16000,), (1, 1, 16000), (1, 100)])
def test_what_is_no_batch_of_clips_is_refused(config: FrontEndConfig, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give \(batch, samples\) with (512|1024) samples or more"):
        build_front_end(config)(torch.zeros(shape))


@every_front_end
def test_filters_are_no_part_of_a_checkpoint(config: FrontEndConfig) -> None:
    assert not build_front_end(config).state_dict()


def test_passt_moves_each_clips_edges_as_the_student_does(clips: Callable[..., Tensor]) -> None:
    waveforms = clips(32000)
    shifts = torch.tensor([[0, 0], [9, -999], [3, 1000]])[: len(waveforms)]
    front_end = build_front_end(PasstMelConfig()).eval()
    moved = front_end(waveforms, edge_shifts_hz=shifts)
    students = LogMelFrontEnd().eval()(waveforms, edge_shifts_hz=shifts)[:, 0]
    torch.testing.assert_close(moved, students, rtol=1e-4, atol=1e-5)
    still = front_end(waveforms)
    torch.testing.assert_close(moved[0], still[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved[1], still[1], atol=1e-2)


@pytest.mark.parametrize("config", [KaldiFbankConfig(), DecibelMelConfig()])
def test_families_without_jitter_keep_their_edges(config: FrontEndConfig, clips: Callable[..., Tensor]) -> None:
    waveforms = clips(16000)
    front_end = build_front_end(config)
    shifts = torch.full((len(waveforms), 2), 500)
    assert torch.equal(front_end(waveforms, edge_shifts_hz=shifts), front_end(waveforms))


def test_configurations_print_what_earlier_stores_hold() -> None:
    rate = "sample_rate_hz=16000, mels="
    assert str(KaldiFbankConfig()) == (
        f"KaldiFbankConfig({rate}128, window_samples=400, hop_samples=160, fft_samples=512, lowest_hz=20.0, "
        "highest_hz=8000.0, frames=1024, mean=-4.2677393, deviation=4.5689974, subtract_mean=True)"
    )
    assert str(DecibelMelConfig()) == (
        f"DecibelMelConfig({rate}64, fft_samples=512, hop_samples=160, lowest_hz=0.0, highest_hz=8000.0, "
        "range_db=120.0)"
    )


def test_filters_of_a_batch_of_views_are_those_of_each_clip_by_itself() -> None:
    draw = np.random.default_rng(0)
    edges = [(float(draw.integers(0, 10)), 15_000.0 + float(draw.integers(-1000, 1000))) for _ in range(32)]
    of_each = torch.stack([get_mel_banks(128, 1024, 32_000, *pair, 100.0, -500.0, 1.0)[0] for pair in edges])
    together = front_ends._moved_kaldi_filters(128, 1024, 32_000, edges, torch.device("cpu"))
    assert torch.equal(together[..., :-1], of_each)
    assert not together[..., -1].any()
