"""AST: a DeiT over spectrogram patches with one learnt encoding for each place in the grid.

Gong, Chung, Glass 2021, "AST: Audio Spectrogram Transformer", arXiv:2104.01778.
"""

import torch
from torch import Generator, Tensor, nn

from teacher.audio_transformer import AudioTransformer, TransformerConfig


class AST(AudioTransformer):
    """Takes (batch, frames, mels), the layout of Kaldi features, with exactly the frames of its encodings."""

    takes_fixed_frames = True

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        dim = config.embed_dim
        self.grid_size = (
            (config.mels - config.patch_shape[0]) // config.stride + 1,
            (config.frames - config.patch_shape[1]) // config.stride + 1,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + self.grid_size[0] * self.grid_size[1], dim))
        self.init_weights()

    def grid_of(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        of_tokens, of_patches = self.pos_embed.split([2, self.pos_embed.shape[1] - 2], dim=1)
        grid = self.patch_embed(self.exact_frames(features).transpose(1, 2))  # (batch, embed_dim, frequency, time)
        grid = grid + of_patches.transpose(1, 2).unflatten(2, self.grid_size)
        return grid, torch.cat([self.cls_token, self.dist_token], dim=1) + of_tokens  # (1, 2, embed_dim)

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence[:, :2].mean(dim=1)  # the class and the distillation token
