"""What an exported file computes, as a module that can be traced, and what it says of itself."""

from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

import student
from pipeline.errors import UsageError
from pipeline.exporting.metadata import ExportMetadata, FrontEnd, Output
from pipeline.models.loading import LoadedModel


class ExportedModel(nn.Module):
    """Sounds, (batch, samples) at the model's rate, or log-mel images of them → one row a sound.

    Args:
        model: a student, on the CPU; `load_model` has folded its batch norms already.
        output: what comes out.
        front_end: inside: waveforms go in. outside: what the model's front end makes of them.

    Raises:
        UsageError: the model is no student.
    """

    def __init__(self, model: LoadedModel, output: Output, front_end: FrontEnd) -> None:
        super().__init__()
        if not isinstance(model.network, student.Tagger):
            raise UsageError(f"{model.source}: {model.model_name} is a transformer; what is exported are students")
        self.network = model.network
        self.front_end = student.DftFrontEnd(self.network.front_end.config) if front_end == "inside" else nn.Identity()
        self.output: Output = output
        self.takes: FrontEnd = front_end
        self.task = model.task
        self.sample_rate_hz = model.sample_rate_hz
        self.fixed_samples = None
        """The only length that the model takes; None where it takes any."""
        if not self.network.takes_any_length:
            self.fixed_samples = round(model.input_seconds * model.sample_rate_hz)
        self.eval()

    @property
    def input_name(self) -> str:
        """What the file calls its input."""
        return "waveforms" if self.takes == "inside" else "log_mels"

    def forward(self, sound: Tensor) -> Tensor:
        """Returns (batch, classes), or (batch, features) where embeddings are the output."""
        return self.finish(self.front_end(sound))

    def finish(self, features: Tensor) -> Tensor:
        """Turn log-mel images, (batch, 1, mels, frames), into what is asked for: (batch, classes or features)."""
        if self.output == "embeddings":
            return self.network.embed(features)
        logits = self.network(features)
        if self.output == "logits":
            return logits
        return logits.softmax(dim=1) if self.task == "single-label" else logits.sigmoid()

    def features(self, waveforms: Tensor) -> Tensor:
        """Turn (batch, samples) into log-mel images by the front end that the model was trained with."""
        return self.network.front_end(waveforms)

    def input_of(self, waveform: np.ndarray) -> np.ndarray:
        """Turn a sound, (samples,), into an input without its batch axis, of the length that the model was trained on.

        What is missing is silence, as in training.
        """
        length = round(self.network.input_seconds * self.sample_rate_hz)
        samples = np.zeros(length, np.float32)
        samples[: len(waveform)] = waveform[:length]
        if self.takes == "inside":
            return samples
        with torch.inference_mode():
            return self.features(torch.from_numpy(samples)[None])[0].numpy()

    def example(self) -> Tensor:
        """Returns an input to trace with; two sounds, as one would be taken for what the batch always is."""
        samples = torch.zeros(2, self.fixed_samples or 2 * self.sample_rate_hz)
        return samples if self.takes == "inside" else self.features(samples)

    def dynamic_shape(self) -> dict[int, object]:
        """Returns the axes of the input that are free, in the words of `torch.export`."""
        free = torch.export.Dim.DYNAMIC
        last = 1 if self.takes == "inside" else 3
        return {0: free} if self.fixed_samples is not None else {0: free, last: free}


def describe(model: LoadedModel, exported: ExportedModel, *, licence: str | None, exporter: str) -> ExportMetadata:
    """Returns what a file says of itself.

    Args:
        model: what it is made from.
        exported: how.
        licence: of the weights; None is that of a released model.
        exporter: the format's own version.
    """
    classes = model.vocabulary.classes
    front_end = exported.network.front_end
    return ExportMetadata.model_construct(
        model=model.model_name,
        output=exported.output,
        front_end=exported.takes,
        front_end_settings=asdict(front_end.config),
        sample_rate_hz=model.sample_rate_hz,
        input_seconds=model.input_seconds,
        shortest_samples=exported.fixed_samples or front_end.shortest_samples,
        task=model.task,
        classes=[label.name for label in classes],
        class_ids=[label.mid for label in classes],
        licence=licence or _released_licence(model) or "not stated",
        source=model.source,
        source_sha256=model.sha256,
        exporter=f"audioset-distill {version('audioset-distill')}, torch {torch.__version__}, {exporter}",
    )


def _released_licence(model: LoadedModel) -> str | None:
    try:
        card = student.model_card(model.model_name)
        return card.licence if student.released_weights(card) == model.source else None
    except ValueError:  # nothing was released under that name
        return None
