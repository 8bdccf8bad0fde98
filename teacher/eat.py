"""EAT: a ViT over patches without overlap, whose class token is classified; SSLAM has the same network.

Chen, Liang, Ma, Zheng, Chen 2024, "EAT: Self-Supervised Pre-Training with Efficient Audio Transformer",
arXiv:2401.03497. Alex, Atito, Mustafa, Awais, Jackson 2025, "SSLAM: Enhancing Self-Supervised Models with Audio
Mixtures for Polyphonic Soundscapes", arXiv:2506.12222.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.blocks import PostNormBlock
from teacher.spelling import Spelling


class EAT(AudioTransformer):
    """Takes (batch, frames, mels), the layout of Kaldi features, with exactly the frames of its encodings.

    The encodings are sines and cosines and are not learnt. The layer norms follow the sums, and one goes before the
    first block.
    """

    pos_embed: Tensor

    takes_fixed_frames = True

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.grid_size = (config.frames // config.stride, config.mels // config.stride)  # time, frequency
        self.register_buffer("pos_embed", sine_encodings(*self.grid_size, config.embed_dim)[None])
        self.input_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.init_weights()

    def build_block(self) -> nn.Module:
        norm_layer: Any = partial(nn.LayerNorm, eps=self.config.norm_eps)
        return PostNormBlock(self.config.embed_dim, self.config.num_heads, qkv_bias=True, norm_layer=norm_layer)

    def build_norm(self) -> nn.Module:
        return nn.Identity()  # every block ends with one

    def grid_of(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        grid = self.patch_embed(self.exact_frames(features))  # (batch, embed_dim, time patches, frequency patches)
        grid = grid + self.pos_embed.transpose(1, 2).unflatten(2, self.grid_size)
        return grid.mT, self.cls_token

    def before_blocks(self, sequence: Tensor) -> Tensor:
        return self.input_norm(sequence)

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence[:, 0]  # the class token


def sine_encodings(times: int, frequencies: int, dim: int) -> Tensor:
    """Returns fixed encodings of a grid, (times * frequencies, dim): half of each is of its band, half of its time."""
    of_times, of_frequencies = torch.meshgrid(torch.arange(times), torch.arange(frequencies), indexing="ij")
    rates = 10000.0 ** -(torch.arange(dim // 4) / (dim / 4))  # (dim / 4,)
    angles = [positions.flatten()[:, None] * rates for positions in (of_frequencies, of_times)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


_ENCODINGS = 64 * 8
"""Of ten seconds. Files hold up to two minutes of them, time after time, and 10 s are all that a release uses."""


def _cut_encodings(tensors: dict[str, Tensor], _: Mapping[str, object]) -> dict[str, Tensor]:
    return {key: value[:, :_ENCODINGS] if key == "pos_embed" else value for key, value in tensors.items()}


# fairseq's files say `model.modality_encoders.IMAGE.…` and `head.…`, the Hugging Face Hub's `model.…` throughout.
SPELLING = Spelling(
    anchor=re.compile(r"(?P<prefix>.*?)(?:model\.)?(?:modality_encoders\.IMAGE\.)?local_encoder\.proj\.weight"),
    renamed=(
        (r"^(?:model\.)?(?:modality_encoders\.IMAGE\.)?", ""),
        (r"^local_encoder\.", "patch_embed."),
        (r"^extra_tokens$", "cls_token"),
        (r"^fixed_positional_encoder\.positions$", "pos_embed"),
        (r"^(?:context_encoder\.norm|pre_norm)\.", "input_norm."),
        (r"^head\.", "head.1."),
        (r"^fc_norm\.", "head.0."),
    ),
    unused=("decoder.", "shared_decoder.", "recon_proj."),
    finish=_cut_encodings,
)
