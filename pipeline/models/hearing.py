"""What a model is given of a clip, and how it tags clips that keep their own lengths."""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pipeline.dataset.clip_lengths import ORDINARY_SECONDS
from pipeline.models.device import Precision, autocast


class AudioModel(Protocol):
    """A model that says which waveforms it takes."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of its waveforms."""
        ...

    @property
    def input_seconds(self) -> float:
        """Length of its waveforms."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInput:
    """The waveforms that a model takes."""

    sample_rate_hz: int
    seconds: float
    """How much of a clip, at most; infinite where a model hears clips to their end."""
    own_lengths: bool
    """Whether shorter clips stay as short as they are, for the front end knows what becomes of them; or else they are
    padded with silence."""


def model_input(model: AudioModel) -> ModelInput:
    """Returns what a model is given of a clip: students what they are trained on, transformers what stage 1 gives."""
    import teacher  # takes timm to import, which a student can do without

    rate, seconds = model.sample_rate_hz, model.input_seconds
    if isinstance(model, teacher.AudioTransformer) and model.front_end.own_length:
        return ModelInput(sample_rate_hz=rate, seconds=model.front_end.longest_seconds, own_lengths=True)
    return ModelInput(sample_rate_hz=rate, seconds=seconds, own_lengths=False)


def tag_waveforms(
    model: nn.Module, waveforms: Tensor, lengths: Tensor | None = None, precision: Precision = "float32"
) -> Tensor:
    """Returns a model's logits, (batch, classes), float32.

    Args:
        model: has a `front_end`.
        waveforms: (batch, samples), on its device.
        lengths: (batch,), int64, on the CPU: the samples of each row that are the clip, for models whose input has
            `own_lengths`; None: all are.
        precision: of the network.
    """
    own, frames = {}, None
    front_end = model.get_submodule("front_end")
    if lengths is not None:
        own, frames = {"lengths": lengths}, front_end.frames(lengths)  # pyright: ignore[reportCallIssue]
    features = front_end(waveforms, **own)
    with autocast(waveforms.device.type, precision):
        return model(features, **({} if frames is None else {"frames": frames})).float()


@torch.no_grad()
def noise_features(model: nn.Module, clips: int) -> Tensor:
    """Returns what a model's network is given of clips of faint noise, (clips, …), on the model's device."""
    audio_model = cast("AudioModel", model)
    samples = round(min(audio_model.input_seconds, ORDINARY_SECONDS) * audio_model.sample_rate_hz)
    device = next(model.parameters()).device
    noise = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))  # (clips, samples)
    return model.get_submodule("front_end")(noise.to(device))
