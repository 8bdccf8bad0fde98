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

    def grid_of(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        grid = self.patch_embed(features)  # (batch, embed_dim, frequency patches, time patches)
        if self.training:
            grid = _encode_times_anywhere(grid, self.time_new_pos_embed, generator)
        else:
            grid = _encode_times(grid, self.time_new_pos_embed)
        grid = grid + self.freq_new_pos_embed
        return grid, torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed  # (1, 2, embed_dim)

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence[:, :2].mean(dim=1)  # the class and the distillation token


def _encode_times(grid: Tensor, encodings: Tensor) -> Tensor:
    """Add (1, embed_dim, 1, times) to (batch, embed_dim, rows, columns), from their beginning."""
    columns = min(grid.shape[3], encodings.shape[3])
    return grid[:, :, :, :columns] + encodings[:, :, :, :columns]


def _encode_times_anywhere(grid: Tensor, encodings: Tensor, generator: Generator | None) -> Tensor:
    """The same from a random place in the encodings."""
    spare = max(0, encodings.shape[3] - grid.shape[3])
    device = None if generator is None else generator.device
    start = int(torch.randint(spare + 1, (), generator=generator, device=device)) if spare else 0
    return _encode_times(grid, encodings[:, :, :, start:])


# A graph chooses for itself, whenever it runs.
torch.fx.wrap("_encode_times")
torch.fx.wrap("_encode_times_anywhere")
