"""CED: a plain ViT over 64 mel bands without overlap, trained by consistent ensemble distillation.

Dinkel, Wang, Yan, Zhang, Wang 2023, arXiv:2308.11957. The released models give probabilities; ours gives logits.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from teacher.audio_transformer import AudioTransformer, TransformerConfig


class CED(AudioTransformer):
    """Takes (batch, mels, frames) of any length in decibels.

    Short clips use the first time encodings. A clip longer than the encodings is cut into pieces, the last padded with
    zeros after normalisation, and its logit is that of the mean probability over the pieces.

    In training mode clips of one length share a choice of patches, which does not depend on the other clips of the
    batch, and of a short clip as large a share is left out as of one with all time encodings.
    """

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        dim = config.embed_dim
        self.init_bn = nn.BatchNorm1d(config.mels, momentum=0.01)
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, config.frequency_rows, 1))
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, config.frames // config.stride))
        self.init_weights()

    def forward(self, features: Tensor, generator: Generator | None = None, frames: Tensor | None = None) -> Tensor:
        if frames is None:
            frames = torch.full((len(features),), features.shape[-1])
            return self._tag(self.init_bn(features), frames, self._used(features.shape[-1]), generator)
        frames = frames.cpu()  # wrappers for several GPUs move what they are given
        normalised = self._normalise(features, frames)  # (batch, mels, frames)
        used = torch.tensor([self._used(count) for count in frames.tolist()], dtype=torch.int64)  # (batch,)
        order = torch.argsort(used, stable=True)
        groups = torch.unique_consecutive(used[order], return_counts=True)[1].tolist()
        draws = _draws_by_length(generator if self.training else None)
        logits = []
        for clips in order.split(groups):
            length = int(used[clips[0]])
            logits.append(self._tag(normalised[clips], frames[clips], length, draws(length)))
        return torch.cat(logits)[torch.argsort(order)]  # (batch, classes)

    def _normalise(self, features: Tensor, frames: Tensor) -> Tensor:
        """Normalise (batch, mels, frames), in training by the statistics of the clips' own frames alone."""
        if not self.training or not self.init_bn.training:
            return self.init_bn(features)
        own = (torch.arange(features.shape[-1]) < frames[:, None]).to(features.device)  # (batch, frames)
        if own.all():
            return self.init_bn(features)
        normalised = torch.zeros_like(features).mT  # (batch, frames, mels)
        normalised[own] = self.init_bn(features.mT[own]).to(normalised)
        return normalised.mT

    def patchout(self, time_patches: int) -> tuple[int, int]:
        share = min(1.0, time_patches / self.time_pos_embed.shape[-1])
        return int(self.config.s_patchout_t * share), int(self.config.u_patchout * share)

    def _used(self, frames: int) -> int:
        """Count the frames that a clip's patches or pieces cover; clips with equal counts go through together."""
        _, patch = self.config.patch_shape
        if frames > self.config.frames:
            return -(-frames // self.config.frames) * self.config.frames
        return (frames - patch) // self.config.stride * self.config.stride + patch

    def _tag(self, normalised: Tensor, frames: Tensor, used: int, generator: Generator | None) -> Tensor:
        if used <= self.config.frames:
            return self.forward_head(self._encode(normalised[..., :used], generator))
        beyond = (torch.arange(used) >= frames[:, None]).to(normalised.device)  # (batch, used)
        normalised = F.pad(normalised, (0, used - normalised.shape[-1])).masked_fill(beyond[:, None], 0.0)
        pieces = normalised.unflatten(-1, (-1, self.config.frames)).movedim(2, 0)  # (pieces, batch, mels, frames)
        logits = self.forward_head(self._encode(pieces.flatten(0, 1), generator))  # (pieces * batch, classes)
        return logit_of_mean_probability(logits.unflatten(0, pieces.shape[:2]))

    def forward_features(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        return self._encode(self.init_bn(features), generator)

    def _encode(self, normalised: Tensor, generator: Generator | None) -> Tensor:
        grid = self.patch_embed(normalised)  # (batch, embed_dim, frequency patches, time patches)
        grid = grid + self.time_pos_embed[..., : grid.shape[-1]] + self.freq_pos_embed
        return self.encode(grid, None, generator)

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence.mean(dim=1)


def _draws_by_length(generator: Generator | None) -> Callable[[int], Generator | None]:
    """Returns what gives clips of a length a generator that does not depend on which other lengths are at hand."""
    if generator is None:
        return lambda length: None
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return lambda length: Generator(generator.device).manual_seed(seed + length)


def logit_of_mean_probability(logits: Tensor) -> Tensor:
    """(pieces, batch, classes) → (batch, classes): average the probabilities, stay exact where they are near 0 or 1."""
    return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)
