import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import teacher
from teacher.passt import PaSST

CARDS = [teacher.model_card(name) for name in teacher.model_names()]
# Upstream's patches are square, so upstream has no like of the tiny model.
RELEASED = [card.name for card in CARDS if card.network is PaSST and not card.config.whole_band]
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def golden(read_golden: Callable):
    return read_golden("passt_s_s10")


@pytest.fixture(scope="module")
def model(golden) -> Iterator[teacher.AudioTransformer]:
    with torch.inference_mode():
        yield teacher.create_model("passt_s_swa_p16_128_ap476", golden.weights).eval()


@pytest.mark.parametrize("duration", ["10s", "4s3", "12s"])
def test_passt_answers_as_upstream_also_for_short_and_long_clips(golden, model, duration: str) -> None:
    golden.assert_answers(model, "mel", duration)


def test_passt_answers_as_upstream_when_asked_as_stage_1_asks(golden, device: torch.device) -> None:
    network = teacher.create_model("passt_s_swa_p16_128_ap476", golden.weights).to(device)
    ensemble = teacher.Ensemble([network], [1.0])
    golden.assert_close(ensemble({32000: golden.clips("4s3").to(device)})[0].cpu(), "logits_4s3")


@pytest.mark.filterwarnings("ignore:Input image size")
@pytest.mark.parametrize("name", RELEASED)
def test_every_passt_equals_hear21passt_from_waveform_to_logits(
    name: str, clips: Callable[..., Tensor], fill_module: Callable
) -> None:
    hear21passt = pytest.importorskip("hear21passt.models.passt", reason="the package hear21passt is not installed")
    from hear21passt.models.preprocess import AugmentMelSTFT
    from hear21passt.wrapper import PasstBasicWrapper

    card = teacher.model_card(name)
    stride, hop, frames = card.config.stride, card.front_end.hop_samples, card.config.frames
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        net = hear21passt.PaSST(img_size=(128, frames), stride=(stride, stride), distilled=True, num_classes=7, **SMALL)
        mel = AugmentMelSTFT(hopsize=hop, fmin_aug_range=10, fmax_aug_range=2000)
        theirs = PasstBasicWrapper(mel=mel, net=net, mode="logits").eval()
        fill_module(theirs)
        ours = teacher.create_model(name, theirs.state_dict(), **SMALL).eval()
        for seconds in (3.0, card.input_seconds):  # hear21passt can't take longer ones
            waveforms = clips(32000, seconds)[:1]
            torch.testing.assert_close(ours(ours.front_end(waveforms)), theirs(waveforms), rtol=0, atol=2e-5)


def test_training_on_short_clips_starts_at_a_random_time_encoding() -> None:
    model = teacher.create_model("passt_tiny", num_classes=3)
    features = torch.randn(1, 128, 400, generator=torch.Generator().manual_seed(1))
    answers = [model(features, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    evaluated = [model.eval()(features, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(evaluated[0], evaluated[1])
    assert not torch.equal(answers[0], evaluated[0])
