"""M2D: a ViT over patches without overlap whose tokens are averaged, clip after clip of ten seconds.

Niizumi, Takeuchi, Ohishi, Harada, Kashino 2022, "Masked Modeling Duo", arXiv:2210.14648; with labels (M2D-X),
arXiv:2404.06095; with captions (M2D-CLAP), arXiv:2406.02032.
"""

import re
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from teacher.any_length import AnyLengthTransformer
from teacher.audio_transformer import TransformerConfig
from teacher.blocks import PooledNorm
from teacher.spelling import Spelling


class M2D(AnyLengthTransformer):
    """Takes (batch, mels, frames) of any length, natural log of power.

    Short clips use the first time encodings. A clip longer than the encodings is cut into pieces, and all patches of
    all of them are averaged. The last patch is filled up with zeros after normalisation. Mean and deviation of the
    features are weights of a release; the pooled vector is normalised by statistics of the training's clips, and in
    training mode by those of the batch.
    """

    norm_stats: Tensor

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        rows, columns = config.mels // config.stride, config.frames // config.stride
        self.grid_size = (rows, columns)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, config.embed_dim))
        self.register_buffer("norm_stats", torch.tensor(_FIRST_RELEASES_STATISTICS))  # mean and deviation
        self.init_weights()

    def build_head_norm(self) -> nn.Module:
        return PooledNorm(self.config.embed_dim)

    def normalise(self, features: Tensor, frames: Tensor | None) -> Tensor:
        mean, deviation = self.norm_stats
        return (features - mean) / deviation

    def used_frames(self, frames: int) -> int:
        """Count whole pieces, and of the last one the frames of its patches, the last of which is filled up."""
        before = (frames - 1) // self.config.frames * self.config.frames
        patches = -(-(frames - before) // self.config.patch)
        return before + min(patches, self.grid_size[1]) * self.config.patch

    def tag(self, normalised: Tensor, frames: Tensor, used: int, generator: Generator | None) -> Tensor:
        beyond = (torch.arange(used) >= frames[:, None]).to(normalised.device)  # (batch, used)
        normalised = F.pad(normalised, (0, used - normalised.shape[-1])).masked_fill(beyond[:, None], 0.0)
        pieces = normalised.split(self.config.frames, dim=-1)
        return self.forward_head(torch.cat([self.encode_features(piece, generator) for piece in pieces], dim=1))

    @property
    def max_frames(self) -> int:
        return self.config.frames

    def fit_piece(self, normalised: Tensor) -> Tensor:
        return _fill_patches(normalised, self.config.patch, self.grid_size[1])

    def grid_of_piece(self, normalised: Tensor) -> tuple[Tensor, Tensor | None]:
        of_class, of_patches = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
        grid = self.patch_embed(normalised)  # (batch, embed_dim, frequency patches, time patches)
        grid = grid + of_patches.mT.unflatten(2, self.grid_size).narrow(3, 0, grid.shape[3])
        return grid, self.cls_token + of_class

    def finish_sequence(self, sequence: Tensor) -> Tensor:
        return sequence[:, 1:]  # the class token is for other tasks

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence.mean(dim=1)


def _fill_patches(normalised: Tensor, patch: int, most: int) -> Tensor:
    """Fill the last patch of (batch, mels, frames) up with zeros, where there is a place for it."""
    patches = min((normalised.shape[2] + patch - 1) // patch, most)
    return F.pad(normalised, [0, patches * patch - normalised.shape[2]])


torch.fx.wrap("_fill_patches")  # its size follows from the input's


_FIRST_RELEASES_STATISTICS = (-7.1, 4.2)
"""Of the releases of 2022, whose files don't hold them."""


def _complete(tensors: dict[str, Tensor], _: Mapping[str, object]) -> dict[str, Tensor]:
    statistics = torch.tensor(_FIRST_RELEASES_STATISTICS)
    return {"norm_stats": statistics, "head.0.num_batches_tracked": torch.tensor(0), **tensors}


# The files of its evaluation package say `module.ar.runtime.backbone.…`, those of its portable class `backbone.…`.
SPELLING = Spelling(
    anchor=re.compile(
        r"(?P<prefix>.*?)(?:ar\.runtime\.backbone\.patch_embed\.proj\.weight|(?:ar\.runtime\.)?(?:backbone\.)?norm_stats)"
    ),
    renamed=(
        (r"^(?:ar\.runtime\.)?backbone\.", ""),
        (r"^head\.(weight|bias)$", r"head.1.\1"),
        (r"^head\.mlp\.mlp\.0\.", "head.1."),
        (r"^(?:head\.norm|head_norm)\.", "head.0."),
    ),
    unused=(
        "ar.",
        "to_spec.",
        "audio_proj.",
        "text_proj.",
        "text_encoder.",
        "offline_predictor.",
        "decoder",
        "mask_token",
    ),
    finish=_complete,
)
