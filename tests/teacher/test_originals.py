"""Every family hears clips of all lengths as its original does; `golden/README.md` says how its answers were made."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import teacher

SECONDS = (1.0, 4.0, 9.99, 10.0, 17.0, 30.0)
NAMES = sorted(path.stem for path in Path(__file__).with_name("golden").glob("*.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits_are_the_originals_at_every_length(name: str, read_original: Callable) -> None:
    original = read_original(name)
    model = teacher.create_model(name, original.weights, **original.size).eval()
    assert model.num_classes == original.classes
    rate = model.sample_rate_hz
    clips = [torch.from_numpy(original.waveform(seconds, rate, 0)) for seconds in SECONDS]
    waveforms = nn.utils.rnn.pad_sequence(clips, batch_first=True)  # (batch, samples)
    lengths = torch.tensor([len(clip) for clip in clips])
    [together] = teacher.Ensemble([model], [1.0])({rate: waveforms}, lengths={rate: lengths})
    with torch.inference_mode():
        for place, (seconds, clip) in enumerate(zip(SECONDS, clips, strict=True)):
            features = model.front_end(clip[None], lengths=lengths[place : place + 1]).double()
            total, norm = original.arrays[f"features_{seconds:g}s"]
            assert features.norm().item() == pytest.approx(norm, rel=1e-6)
            assert features.sum().item() == pytest.approx(total, abs=1e-6 * norm * features.numel() ** 0.5)
            theirs = torch.from_numpy(original.arrays[f"logits_{seconds:g}s"])
            assert (together[place] - theirs).abs().max() < 1e-5 * theirs.std()
