"""One stretch of sound → the probabilities of a model's classes, at the sound's own length."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import student
import teacher
from pipeline.models.hearing import tag_waveforms
from pipeline.models.loading import LoadedModel


def longest_seconds(model: LoadedModel) -> float:
    """Returns how much of a sound a model can hear at once; infinite for CNNs, which take any length."""
    network = model.network
    if isinstance(network, teacher.AudioTransformer):
        takes_any = math.isinf(network.front_end.longest_seconds)
    else:
        takes_any = isinstance(network, student.Tagger) and network.takes_any_length
    return math.inf if takes_any else model.input_seconds


@torch.inference_mode()
def tag_window(model: LoadedModel, window: np.ndarray) -> np.ndarray:
    """Returns the probabilities of the classes in a stretch of sound, (samples,) → (classes,).

    Nothing is added to it, unless its model can't do without: a transformer's front end takes it as its original takes
    a clip of that length, and a CNN whose gates are built for a number of frames gets silence up to its length.

    Args:
        model: what `load_model` gives.
        window: float32 at the model's rate, at most `longest_seconds` of it.

    Raises:
        torch.OutOfMemoryError: it is too long for the memory.
    """
    network = model.network
    waveform = torch.from_numpy(window).to(next(network.parameters()).device)[None]  # one clip
    logits = _logits(network, waveform, model)[0]  # (classes,)
    return (logits.softmax(dim=0) if model.task == "single-label" else logits.sigmoid()).cpu().numpy()


def _logits(network: nn.Module, waveform: Tensor, model: LoadedModel) -> Tensor:
    if isinstance(network, teacher.AudioTransformer):
        return tag_waveforms(network, waveform, torch.tensor([waveform.shape[1]]))
    assert isinstance(network, student.Tagger), type(network)
    shortest = network.front_end.shortest_samples
    if not network.takes_any_length:
        shortest = round(model.input_seconds * model.sample_rate_hz)
    return network(network.front_end(F.pad(waveform, (0, max(0, shortest - waveform.shape[1])))))
