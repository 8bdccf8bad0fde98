"""HEAR's interface (https://hearbenchmark.com/hear-api.html): embeddings of sounds, and of each moment of them.

`load_model` takes a checkpoint's location, or a released model's name; layers may follow behind a colon, since HEAR's
programs hand over one text: `mn10_as`, `mn10_as:efficientat`, `runs/mn10/best.safetensors:b11`, `ced_tiny`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.embeddings.layers import PENULTIMATE, Embedder
from pipeline.models.device import choose_device
from pipeline.models.hearing import model_input
from pipeline.models.loading import load_model as load_checkpoint

DEFAULT_MODEL = "mn10_as"
WINDOW_SECONDS = 0.16
"""What a timestamp's embedding hears, around it; as EfficientAT's and PaSST's own wrappers have it."""
HOP_SECONDS = 0.05
SCENE_HOP_SECONDS = 2.5
"""Between the windows of a sound that is longer than the model's input; their embeddings are averaged."""
_WINDOWS_AT_ONCE = 64


class HearModel(nn.Module):
    """A student or teacher as HEAR's programs want it."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.sample_rate = embedder.sample_rate_hz
        self.scene_embedding_size = self.timestamp_embedding_size = embedder.size
        wanted = model_input(embedder.network)  # pyright: ignore[reportArgumentType]
        self.own_lengths = wanted.own_lengths
        self.max_samples = None if wanted.own_lengths else round(wanted.seconds * self.sample_rate)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    def forward(self, sounds: Tensor) -> Tensor:
        """(batch, samples), of at most `max_samples` → (batch, size), float32."""
        sounds = sounds.to(self.device, torch.float32)
        if not self.own_lengths:
            return self.embedder(F.pad(sounds, (0, max(0, self._shortest - sounds.shape[1]))))
        return self.embedder(sounds, torch.full((len(sounds),), sounds.shape[1]))

    @property
    def _shortest(self) -> int:
        front_end = self.embedder.network.get_submodule("front_end")
        return front_end.shortest_samples  # pyright: ignore[reportReturnType]

    def windows(self, sounds: Tensor, window: int, hop_seconds: float) -> tuple[Tensor, Tensor]:
        """Embed windows around every hop, the ends of the sounds mirrored.

        Args:
            sounds: (batch, samples).
            window: its length, in samples.
            hop_seconds: between two windows' middles.

        Returns:
            Embeddings (batch, windows, size), and their middles (batch, windows) in milliseconds.
        """
        samples = sounds.shape[1]
        count = int(samples / self.sample_rate / hop_seconds + 1e-6) + 1
        seconds = torch.arange(count, dtype=torch.float64) * hop_seconds
        starts = (seconds * self.sample_rate).round().long()  # each rounded by itself, so that no error adds up
        before = window // 2
        reach = min(before, samples - 1)
        padded = F.pad(F.pad(sounds[:, None], (reach, reach), mode="reflect")[:, 0], (before - reach, window))
        found = []
        for sound in padded:
            pieces = torch.stack([sound[start : start + window] for start in starts.tolist()])  # (windows, window)
            found.append(torch.cat([self(some) for some in pieces.split(_WINDOWS_AT_ONCE)]))
        return torch.stack(found), (1000 * seconds).float().expand(len(sounds), -1)


def load_model(model_file_path: str = "", layers: str = "", device: str = "auto") -> HearModel:
    """Load a student or teacher.

    Args:
        model_file_path: a file, URL or released name; NAME=FILE names the model in a file that does not say it, and
            `:LAYERS` may follow. Empty is mn10_as.
        layers: what the embedding is made of, as `pipeline embed --layer` has it; empty is the penultimate layer.
        device: cpu, cuda, …; auto takes a GPU where there is one.

    Raises:
        PipelineError: there is no such model or layer, or its weights can't be had.
    """
    location, colon, behind = model_file_path.rpartition(":")
    if not colon or "/" in behind or "\\" in behind:
        location, behind = model_file_path, ""
    loaded = load_checkpoint(location or DEFAULT_MODEL, device=choose_device(device))
    return HearModel(Embedder(loaded.network, layers or behind or PENULTIMATE, loaded.name)).eval()


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Returns one vector a sound, (n_sounds, scene_embedding_size), float32.

    Args:
        audio: (n_sounds, n_samples), -1 to 1, at `model.sample_rate`.
        model: from `load_model`.
    """
    if model.max_samples is None or audio.shape[1] <= model.max_samples:
        return torch.cat([model(some) for some in audio.split(_WINDOWS_AT_ONCE)])
    return model.windows(audio, model.max_samples, SCENE_HOP_SECONDS)[0].mean(dim=1)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Returns a vector every 50 ms, of the 160 ms around it.

    Args:
        audio: (n_sounds, n_samples), -1 to 1, at `model.sample_rate`.
        model: from `load_model`.

    Returns:
        Embeddings (n_sounds, n_timestamps, timestamp_embedding_size), float32, and the middles of what they hear,
        (n_sounds, n_timestamps), in milliseconds.
    """
    return model.windows(audio, round(WINDOW_SECONDS * model.sample_rate), HOP_SECONDS)
