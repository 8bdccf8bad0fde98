"""Networks that take clips of any length: those of one length go through together, and none hears its neighbours."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from teacher.audio_transformer import AudioTransformer
from teacher.patches import without_channel
from teacher.tracing import is_traced


class AnyLengthTransformer(AudioTransformer):
    """Base of the families that don't bring all clips to one length.

    In training mode clips of one length share a choice of patches, which does not depend on the other clips of the
    batch.
    """

    def forward(self, features: Tensor, generator: Generator | None = None, frames: Tensor | None = None) -> Tensor:
        if is_traced(features) or not self.pools:
            return super().forward(features)  # one length of all clips, of one piece
        normalised = self.normalise(without_channel(features), frames)  # (batch, mels, frames)
        if frames is None:
            frames = torch.full((len(normalised),), normalised.shape[-1])
            return self.tag(normalised, frames, self.used_frames(normalised.shape[-1]), generator)
        frames = frames.cpu()  # wrappers for several GPUs move what they are given
        used = torch.tensor([self.used_frames(count) for count in frames.tolist()], dtype=torch.int64)  # (batch,)
        order = torch.argsort(used, stable=True)
        groups = torch.unique_consecutive(used[order], return_counts=True)[1].tolist()
        draws = _draws_by_length(generator if self.training else None)
        logits = []
        for clips in order.split(groups):
            length = int(used[clips[0]])
            logits.append(self.tag(normalised[clips], frames[clips], length, draws(length)))
        return torch.cat(logits)[torch.argsort(order)]  # (batch, classes)

    @property
    def max_frames(self) -> int | None:
        """Frames that go through the blocks at once, at most; None is any number."""
        return None

    def grid_of(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        features = without_channel(features)
        if self.max_frames is not None:
            features = _one_piece(features, self.max_frames, self.model_name or "this network")
        return self.grid_of_piece(self.fit_piece(self.normalise(features, None)))

    def fit_piece(self, normalised: Tensor) -> Tensor:
        """Bring one piece, (batch, mels, frames), to the frames that its patches cover, where convolutions don't."""
        return normalised

    def normalise(self, features: Tensor, frames: Tensor | None) -> Tensor:
        """Bring what the front end gives into (batch, mels, frames) and into the network's range.

        Args:
            features: of the front end.
            frames: (batch,): how many of each clip's frames are its own; None is all of them.
        """
        return features

    @abstractmethod
    def used_frames(self, frames: int) -> int:
        """Count the frames that a clip's patches or pieces cover; clips with equal counts go through together."""

    def tag(self, normalised: Tensor, frames: Tensor, used: int, generator: Generator | None) -> Tensor:
        """Returns the logits, (batch, classes), of clips that use equally many frames.

        Args:
            normalised: (batch, mels, frames).
            frames: (batch,): the clips' own frames.
            used: frames that their patches cover.
            generator: see `forward`.
        """
        return self.forward_head(self.encode_features(normalised[..., :used], generator))

    def encode_features(self, normalised: Tensor, generator: Generator | None) -> Tensor:
        """(batch, mels, frames) of one piece → (batch, tokens, embed_dim)."""
        return self.encode(*self.grid_of_piece(normalised), generator)

    @abstractmethod
    def grid_of_piece(self, normalised: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same as `grid_of`, of features that are normalised, of one piece."""


def _one_piece(features: Tensor, most: int, name: str) -> Tensor:
    if features.shape[2] > most:
        raise ValueError(
            f"features have {features.shape[2]} frames, and {name} takes longer clips than {most} piece by piece: call "
            "it whole (forward), or give shorter clips"
        )
    return features


torch.fx.wrap("_one_piece")  # a graph checks as well


def _draws_by_length(generator: Generator | None) -> Callable[[int], Generator | None]:
    """Returns what gives clips of a length a generator that does not depend on which other lengths are at hand."""
    if generator is None:
        return lambda length: None
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return lambda length: Generator(generator.device).manual_seed(seed + length)
