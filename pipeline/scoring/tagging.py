"""Windows of sound → the logits of a model's classes, of each window or of each frame in it."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import student
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import PipelineError
from pipeline.models.hearing import tag_waveforms
from pipeline.models.loading import LoadedModel
from pipeline.models.weights import Task


class TorchTagger:
    """A student or a transformer, for windows of any length that it can hear.

    Args:
        model: what `load_model` gives.
        device: what messages call the device that it is on.
    """

    def __init__(self, model: LoadedModel, device: str = "cpu") -> None:
        self._network, self._model, self._device = model.network, model, device
        self.name = model.name
        self.sample_rate_hz: int = model.sample_rate_hz
        self.input_seconds: float = model.input_seconds
        self.vocabulary: Vocabulary = model.vocabulary
        self.task: Task = model.task
        self.longest_seconds = longest_seconds(model)
        self.on_gpu = next(model.network.parameters()).device.type != "cpu"
        self.frame_samples: int | None = None
        """The step of its last maps; None where it gives no finer timeline."""
        self.is_fully_convolutional = False
        if isinstance(model.network, student.Tagger) and model.network.takes_any_length:
            reduction = int(model.network.feature_info[-1]["reduction"])
            self.frame_samples = reduction * model.network.front_end.config.hop_samples
            self.is_fully_convolutional = model.network.hears_frames

    @torch.inference_mode()
    def logits(self, windows: np.ndarray) -> np.ndarray:
        """Returns the logits of the classes in windows of one length, (batch, samples) float32 → (batch, classes).

        Nothing is added to them, unless the model can't do without: a transformer's front end takes a window as its
        original takes a clip of that length, and a CNN whose gates are built for a number of frames gets silence up to
        its length.

        Raises:
            PipelineError: they are too long for the memory.
        """
        return self._run(windows, lambda waveforms: _logits(self._network, waveforms, self._model))

    @torch.inference_mode()
    def frame_logits(self, windows: np.ndarray) -> np.ndarray:
        """Returns the logits in each step of `frame_samples`: (batch, samples) float32 → (batch, frames, classes).

        Raises:
            PipelineError: the windows are too long for the memory.
        """
        network = self._network
        assert isinstance(network, student.Tagger), type(network)
        return self._run(
            windows,
            lambda waveforms: network.forward_frames(network.forward_features(_features(network, waveforms))),
        )

    def _run(self, windows: np.ndarray, compute: Callable[[Tensor], Tensor]) -> np.ndarray:
        waveforms = torch.from_numpy(np.ascontiguousarray(windows)).to(next(self._network.parameters()).device)
        try:
            return compute(waveforms).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            seconds = windows.shape[1] / self.sample_rate_hz
            raise PipelineError(
                f"{len(windows)} windows of {seconds:.0f} s are too long for the memory of {self._device}. Give "
                "--window 10, or a lower --batch-size"
            ) from error


def longest_seconds(model: LoadedModel) -> float:
    """Returns how much of a sound a model can hear at once; infinite for CNNs, which take any length."""
    network = model.network
    if isinstance(network, student.Tagger):
        return math.inf if network.takes_any_length else model.input_seconds
    takes_any = math.isinf(getattr(network.front_end, "longest_seconds", model.input_seconds))
    return math.inf if takes_any else model.input_seconds


def _logits(network: nn.Module, waveforms: Tensor, model: LoadedModel) -> Tensor:
    if not isinstance(network, student.Tagger):
        return tag_waveforms(network, waveforms, torch.full((len(waveforms),), waveforms.shape[1]))
    if not network.takes_any_length:
        missing = round(model.input_seconds * model.sample_rate_hz) - waveforms.shape[1]
        waveforms = F.pad(waveforms, (0, max(0, missing)))
    return network(_features(network, waveforms))


def _features(network: student.Tagger, waveforms: Tensor) -> Tensor:
    return network.front_end(F.pad(waveforms, (0, max(0, network.front_end.shortest_samples - waveforms.shape[1]))))
