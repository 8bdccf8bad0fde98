"""ATST-Frame and ATST-Clip: a ViT over patches of four frames and all bands, 40 ms each.

Li, Shao, Li 2023, "Self-supervised Audio Teacher-Student Transformer for Both Clip-level and Frame-level Tasks",
arXiv:2306.04186; ATST-Clip comes from arXiv:2204.12076.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Generator, Tensor, nn

from teacher.any_length import AnyLengthTransformer
from teacher.audio_transformer import TransformerConfig
from teacher.blocks import PooledNorm
from teacher.spelling import Spelling


class ATSTFrame(AnyLengthTransformer):
    """Takes (batch, mels, frames) of any length in decibels, scaled; the tokens are averaged.

    A clip is cut into pieces, of which a later one counts when it is longer than half a piece; what the pieces give is
    averaged and normalised by statistics of the training's clips, in training mode by those of the batch.
    """

    piece_frames = 1001
    """What goes through the blocks at once: as much as a clip of training had."""

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.frames // config.stride, config.embed_dim))
        self.init_weights()

    def build_block(self) -> nn.Module:
        config = self.config
        norm_layer: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        return Block(config.embed_dim, config.num_heads, qkv_bias=False, norm_layer=norm_layer)

    def build_head_norm(self) -> nn.Module:
        return PooledNorm(self.pooled_dim)

    @property
    def max_frames(self) -> int:
        return self.piece_frames

    def used_frames(self, frames: int) -> int:
        pieces, rest = divmod(frames, self.piece_frames)
        if pieces and rest <= self.piece_frames // 2:
            rest = 0
        return pieces * self.piece_frames + rest // self.config.patch * self.config.patch

    def tag(self, normalised: Tensor, frames: Tensor, used: int, generator: Generator | None) -> Tensor:
        pooled = []
        for number, piece in enumerate(normalised[..., :used].split(self.piece_frames, dim=-1)):
            sequence = self.encode_features(piece, generator)  # (batch, tokens, embed_dim)
            remaining = (frames - number * self.piece_frames) // self.config.patch  # (batch,), patches
            pooled.append(self.pool_piece(sequence, remaining.to(sequence.device)[:, None]))
        with torch.autocast(normalised.device.type, enabled=False):
            return self.classify(torch.stack(pooled).mean(dim=0).to(self.patch_embed.proj.weight.dtype))

    def grid_of_piece(self, normalised: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = self.patch_embed(normalised)  # (batch, embed_dim, 1, time patches)
        return grid + self.pos_embed.narrow(1, 1, grid.shape[3]).mT.unsqueeze(2), self.prefix_tokens()

    def prefix_tokens(self) -> Tensor | None:
        """Returns what stands before the patches, (1, tokens, embed_dim)."""
        return None

    def pool_piece(self, sequence: Tensor, remaining: Tensor) -> Tensor:
        """Returns one vector a clip, (batch, pooled_dim), of a piece.

        Args:
            sequence: (batch, tokens, embed_dim).
            remaining: (batch, 1): patches of the clip from the piece's beginning to the clip's end.
        """
        return sequence.mean(dim=1)

    def pool(self, sequence: Tensor) -> Tensor:
        patches = sequence.shape[1] - (0 if self.prefix_tokens() is None else 1)
        return self.pool_piece(sequence, sequence.new_full((sequence.shape[0], 1), patches))


class ATSTClip(ATSTFrame):
    """The same with a class token, in pieces of six seconds; the token and the sum over the patches are classified.

    As in the original, that sum is divided by the patches up to the clip's end and not by those of the piece.
    """

    piece_frames = 601

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.init_weights()

    @property
    def pooled_dim(self) -> int:
        return 2 * self.config.embed_dim

    def prefix_tokens(self) -> Tensor:
        return self.cls_token + self.pos_embed[:, :1]

    def pool_piece(self, sequence: Tensor, remaining: Tensor) -> Tensor:
        return torch.cat([sequence[:, 0], sequence[:, 1:].sum(dim=1) / remaining], dim=1)


def _finish(tensors: dict[str, Tensor], _: Mapping[str, object]) -> dict[str, Tensor]:
    """Give the linear map of patches, (embed_dim, mels * frames), the shape of a convolution's."""
    weight = tensors.pop("patch_embed.proj.weight")
    return {
        "head.0.num_batches_tracked": torch.tensor(0),
        **tensors,
        "patch_embed.proj.weight": weight.reshape(len(weight), 1, -1, _PATCH_FRAMES),
    }


_PATCH_FRAMES = 4

SPELLING = Spelling(
    anchor=re.compile(r"(?P<prefix>.*?)(?:encoder\.)*patch_embed\.patch_embed\.weight"),
    renamed=(
        (r"^(?:encoder\.)+", ""),
        (r"^patch_embed\.patch_embed\.", "patch_embed.proj."),
        (r"^norm_frame\.", "norm."),
        (r"^head\.norm\.", "head.0."),
        (r"^head\.linear\.", "head.1."),
    ),
    unused=("mask_embed", "loss_fn.", "metric."),
    finish=_finish,
)
