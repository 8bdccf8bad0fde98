"""CED: a plain ViT over 64 mel bands without overlap, trained by consistent ensemble distillation.

Dinkel, Wang, Yan, Zhang, Wang 2023, arXiv:2308.11957. The released models give probabilities; ours gives logits.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from teacher.any_length import AnyLengthTransformer
from teacher.audio_transformer import TransformerConfig


class CED(AnyLengthTransformer):
    """Takes (batch, mels, frames) of any length in decibels.

    Short clips use the first time encodings. A clip longer than the encodings is cut into pieces, the last padded with
    zeros after normalisation, and its logit is that of the mean probability over the pieces.

    In training mode of a shorter clip as large a share of the patches is left out as of one of `input_seconds`.
    """

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        dim = config.embed_dim
        self.init_bn = nn.BatchNorm1d(config.mels, momentum=0.01)
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, config.frequency_rows, 1))
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, config.frames // config.stride))
        self.init_weights()

    def normalise(self, features: Tensor, frames: Tensor | None) -> Tensor:
        """Normalise (batch, mels, frames), in training by the statistics of the clips' own frames alone."""
        if frames is None or not self.training or not self.init_bn.training:
            return self.init_bn(features)
        own = (torch.arange(features.shape[-1]) < frames.cpu()[:, None]).to(features.device)  # (batch, frames)
        if own.all():
            return self.init_bn(features)
        normalised = torch.zeros_like(features).mT  # (batch, frames, mels)
        normalised[own] = self.init_bn(features.mT[own]).to(normalised)
        return normalised.mT

    @property
    def max_frames(self) -> int:
        return self.config.frames

    def patchout(self, time_patches: int) -> tuple[int, int]:
        if not (self.config.s_patchout_t or self.config.u_patchout):
            return 0, 0
        frames = self.front_end.frames(torch.tensor([round(self.input_seconds * self.sample_rate_hz)]))
        assert frames is not None  # its front end doesn't bring clips to one length
        share = min(1.0, time_patches * self.config.stride / self.used_frames(int(frames)))
        return int(self.config.s_patchout_t * share), int(self.config.u_patchout * share)

    def used_frames(self, frames: int) -> int:
        _, patch = self.config.patch_shape
        if frames > self.config.frames:
            return -(-frames // self.config.frames) * self.config.frames
        return (frames - patch) // self.config.stride * self.config.stride + patch

    def tag(self, normalised: Tensor, frames: Tensor, used: int, generator: Generator | None) -> Tensor:
        if used <= self.config.frames:
            return self.forward_head(self.encode_features(normalised[..., :used], generator))
        beyond = (torch.arange(used) >= frames[:, None]).to(normalised.device)  # (batch, used)
        normalised = F.pad(normalised, (0, used - normalised.shape[-1])).masked_fill(beyond[:, None], 0.0)
        pieces = normalised.unflatten(-1, (-1, self.config.frames)).movedim(2, 0)  # (pieces, batch, mels, frames)
        logits = self.forward_head(self.encode_features(pieces.flatten(0, 1), generator))  # (pieces * batch, classes)
        by_piece = logits.unflatten(0, pieces.shape[:2])
        return logit_of_mean_probability(by_piece) if self.num_classes else by_piece.mean(dim=0)

    def grid_of_piece(self, normalised: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = self.patch_embed(normalised)  # (batch, embed_dim, frequency patches, time patches)
        return grid + self.time_pos_embed.narrow(3, 0, grid.shape[3]) + self.freq_pos_embed, None

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence.mean(dim=1)


def logit_of_mean_probability(logits: Tensor) -> Tensor:
    """(pieces, batch, classes) → (batch, classes): average the probabilities, stay exact where they are near 0 or 1."""
    return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)
