"""PaSST: a DeiT over spectrogram patches; time and frequency have their own encodings, so whole rows can be left out.

Koutini, Schlüter, Eghbal-zadeh and Widmer 2022, "Efficient Training of Audio Transformers with Patchout",
arXiv:2110.05069.
"""

import torch
from torch import Generator, Tensor, nn

from teacher.audio_transformer import AudioTransformer, TransformerConfig


class PaSST(AudioTransformer):
    """Takes (batch, mels, frames) of any length: short clips use the first time encodings, long clips are cut.

    In training mode a short clip starts at a random time encoding instead, so that all of them learn.
    """

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
        self.new_pos_embed = nn.Parameter(torch.empty(1, 2, dim))
        self.freq_new_pos_embed = nn.Parameter(torch.empty(1, dim, config.frequency_rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.empty(1, dim, 1, config.frames // config.stride))
        self.init_weights()

    def forward_features(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        grid = self.patch_embed(features)  # (batch, embed_dim, frequency patches, time patches)
        time = self._time_encodings(grid.shape[-1], generator)
        grid = grid[..., : time.shape[-1]] + time + self.freq_new_pos_embed
        tokens = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed  # (1, 2, embed_dim)
        return self.encode(grid, tokens, generator)

    def _time_encodings(self, time_patches: int, generator: Generator | None) -> Tensor:
        """(1, embed_dim, 1, at most `time_patches`)."""
        spare = self.time_new_pos_embed.shape[-1] - time_patches
        start = 0
        if self.training and spare > 0:
            device = generator.device if generator is not None else None
            start = int(torch.randint(spare + 1, (), generator=generator, device=device))
        return self.time_new_pos_embed[..., start : start + time_patches]

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence[:, :2].mean(dim=1)  # the class and the distillation token
