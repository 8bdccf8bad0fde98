"""Clips of unlike lengths in one batch, each heard as its teacher's original hears it alone."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from original_teachers import SECONDS, ast_features, ced_probabilities, fades, passt_clip
from torch import Tensor, nn

from teacher import AudioTransformer, Ensemble, create_model
from teacher.front_ends import KaldiFbankConfig, PasstMelConfig, build_front_end


def as_batch(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, samples) with zeros behind the shorter ones, and the lengths."""
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def lively(network: AudioTransformer) -> AudioTransformer:
    """Draw weights that don't shrink what goes through, so that logits differ where features do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return network.eval()


def test_ast_fills_features_up_as_the_original_does() -> None:
    clips = fades(16_000)
    waveforms, lengths = as_batch(clips)
    features = build_front_end(KaldiFbankConfig())(waveforms, lengths=lengths)
    assert features.shape == (len(clips), 1024, 128)
    for ours, clip in zip(features, clips, strict=True):
        torch.testing.assert_close(ours, ast_features(clip), rtol=1e-4, atol=1e-4)


def test_ast_fills_features_up_as_hugging_face_does() -> None:
    transformers = pytest.importorskip("transformers")
    clips = fades(16_000)
    waveforms, lengths = as_batch(clips)
    theirs = transformers.ASTFeatureExtractor()(list(map(np.asarray, clips)), sampling_rate=16_000, return_tensors="pt")
    ours = build_front_end(KaldiFbankConfig(subtract_mean=False))(waveforms, lengths=lengths)
    torch.testing.assert_close(ours, theirs["input_values"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seconds", [10.0, 20.0])
def test_passt_adds_silence_or_cuts_at_the_models_length(seconds: float) -> None:
    clips = fades(32_000, (1.0, 9.99, 10.0, 10.01, 30.0))
    waveforms, lengths = as_batch(clips)
    front_end = build_front_end(PasstMelConfig(), seconds).eval()
    expected = front_end(torch.stack([passt_clip(clip, seconds) for clip in clips]))
    torch.testing.assert_close(front_end(waveforms, lengths=lengths), expected, rtol=0, atol=0)


def test_ced_hears_each_clip_whole_and_adds_nothing() -> None:
    network = lively(create_model("ced_tiny", num_classes=7, depth=2))
    weights = {
        f"init_bn.1.{key[8:]}" if key.startswith("init_bn.") else key.replace("head.", "outputlayer."): value
        for key, value in network.state_dict().items()
    }
    clips = fades(16_000)
    waveforms, lengths = as_batch(clips)
    with torch.inference_mode():
        ours = network(network.front_end(waveforms, lengths=lengths), frames=network.front_end.frames(lengths))
        theirs = torch.stack([ced_probabilities(clip, weights, heads=3) for clip in clips])
    torch.testing.assert_close(ours.sigmoid(), theirs, rtol=0, atol=1e-5)
    assert theirs.std(dim=0).min() > 1e-3, "these weights tell no clip from another"


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny", "ced_tiny"])
def test_a_clips_logits_do_not_depend_on_the_lengths_of_its_neighbours(name: str) -> None:
    ensemble = Ensemble([lively(create_model(name, num_classes=7))], [1])
    [rate] = ensemble.sample_rates_hz
    waveforms, lengths = as_batch(fades(rate))
    together = ensemble({rate: waveforms}, lengths={rate: lengths})
    for clip, (waveform, length) in enumerate(zip(waveforms, lengths.tolist(), strict=True)):
        alone = ensemble({rate: waveform[None, :length]}, lengths={rate: torch.tensor([length])})
        torch.testing.assert_close(together[:, clip], alone[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny", "ced_tiny"])
def test_clips_too_short_for_the_original_are_filled_up_with_silence(name: str) -> None:
    ensemble = Ensemble([lively(create_model(name, num_classes=7))], [1])
    [rate] = ensemble.sample_rates_hz
    waveforms, lengths = as_batch([torch.full((samples,), 0.1) for samples in (1, 100, 2000)])
    found = ensemble({rate: waveforms}, lengths={rate: lengths})
    assert found.isfinite().all()
    assert found.shape == (1, 3, 7)


class Recorder(nn.Module):
    """A teacher of somebody else's that keeps what it was given."""

    sample_rate_hz = 16_000

    def __init__(self, input_seconds: float, front_end: nn.Module | None = None) -> None:
        super().__init__()
        self.input_seconds = input_seconds
        self.front_end = front_end or nn.Identity()
        self.given: list[tuple[int, ...]] = []

    def forward(self, features: Tensor | dict[str, Tensor]) -> Tensor:
        features = features if isinstance(features, Tensor) else features["waveform"]
        self.given.append(tuple(features.shape))
        return features.sum(dim=1, keepdim=True).expand(-1, 7)


def test_a_foreign_teacher_gets_silence_or_a_cut_to_its_length() -> None:
    member = Recorder(2.0)
    waveforms, lengths = as_batch(fades(16_000, (1.0, 3.0, 1.0)))
    found = Ensemble([member], [1])({16_000: waveforms}, lengths={16_000: lengths})
    assert member.given == [(3, 32_000)]
    torch.testing.assert_close(found[0, :, 0], waveforms[:, :32_000].sum(dim=1))


def test_a_foreign_teacher_without_a_length_gets_clips_as_long_as_they_are() -> None:
    member = Recorder(math.inf)
    waveforms, lengths = as_batch(fades(16_000, (1.0, 3.0, 1.0)))
    ensemble = Ensemble([member], [1])
    assert ensemble.clip_seconds == math.inf
    found = ensemble({16_000: waveforms}, lengths={16_000: lengths})
    assert member.given == [(2, 16_000), (1, 48_000)]
    torch.testing.assert_close(found[0, :, 0], waveforms.sum(dim=1))


class Pads(nn.Module):
    """A front end that brings clips to one length by itself, and names what it gives."""

    def forward(self, waveforms: Tensor) -> dict[str, Tensor]:
        return {"waveform": nn.functional.pad(waveforms, (0, 48_000 - waveforms.shape[1]))}


def test_clips_whose_features_have_one_size_go_through_the_network_together() -> None:
    member = Recorder(math.inf, Pads())
    waveforms, lengths = as_batch(fades(16_000, (3.0, 1.0, 2.0)))
    found = Ensemble([member], [1])({16_000: waveforms}, lengths={16_000: lengths})
    assert member.given == [(3, 48_000)]
    torch.testing.assert_close(found[0, :, 0], waveforms.sum(dim=1))


def test_lengths_survive_a_batch_that_is_halved_for_the_memory(clips: Callable[..., Tensor]) -> None:
    ensemble = Ensemble([lively(create_model("ced_tiny", num_classes=7, depth=1))], [1])
    waveforms, lengths = as_batch(fades(16_000, SECONDS[:5]))
    expected = ensemble({16_000: waveforms}, lengths={16_000: lengths})
    ensemble.largest_batch = 2
    halved = ensemble({16_000: waveforms}, lengths={16_000: lengths})
    torch.testing.assert_close(halved, expected, rtol=0, atol=2e-5)
