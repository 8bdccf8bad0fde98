"""BEATs: a ViT over patches without overlap, with position biases that each head opens and closes by what it looks for.

Chen, Wu, Wang, Liu, Tompkins, Chen, Wei 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers", arXiv:2212.09058.
The released models give probabilities in an order of classes of their own; ours gives logits in AudioSet's.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from teacher.any_length import AnyLengthTransformer
from teacher.audio_transformer import TransformerConfig
from teacher.audioset import class_ids
from teacher.blocks import PostNormBlock
from teacher.patches import PatchEmbed
from teacher.spelling import Spelling

_PATCH_DIM = 512
_BUCKETS = 320
_MAX_DISTANCE = 800
_POSITION_KERNEL = 128
_POSITION_GROUPS = 16


class BEATs(AnyLengthTransformer):
    """Takes (batch, frames, mels) of any length, in 16-bit sound's range; a clip is heard to its end.

    The patches stand time after time, eight bands each, and know of their places by a convolution over the sequence and
    by a bias for each distance within it. That bias is looked up once for all blocks. Nothing is left out in training,
    for distances would no longer be what they were.
    """

    time_major = True

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        if config.s_patchout_t or config.s_patchout_f or config.u_patchout:
            raise ValueError("BEATs has no patchout: its positions are distances between neighbours; leave it at 0")
        super().__init__(config, num_classes)
        dim = config.embed_dim
        self.patch_norm = nn.LayerNorm(_PATCH_DIM)
        self.patch_proj = nn.Linear(_PATCH_DIM, dim)
        self.pos_conv = nn.Conv1d(dim, dim, _POSITION_KERNEL, padding=_POSITION_KERNEL // 2, groups=_POSITION_GROUPS)
        self.input_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.relative_bias = nn.Parameter(torch.empty(_BUCKETS, config.num_heads))
        self.init_weights()

    def build_patch_embed(self) -> PatchEmbed:
        return PatchEmbed(self.config.patch_shape, self.config.stride, _PATCH_DIM, bias=False)

    def build_block(self) -> nn.Module:
        config = self.config
        norm_layer: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        block = PostNormBlock(config.embed_dim, config.num_heads, norm_layer=norm_layer)
        block.attn = GatedBiasAttention(config.embed_dim, config.num_heads)
        block.residual_scale = (2 * config.depth) ** 0.25
        return block

    def build_norm(self) -> nn.Module:
        return nn.Identity()  # every block ends with one

    def build_head_norm(self) -> nn.Module:
        return nn.Identity()

    def normalise(self, features: Tensor, frames: Tensor | None) -> Tensor:
        return features.mT

    def used_frames(self, frames: int) -> int:
        return frames // self.config.patch * self.config.patch

    def grid_of_piece(self, normalised: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.patch_embed(normalised.mT), None  # (batch, patch dim, time patches, frequency patches)

    def before_blocks(self, sequence: Tensor) -> Tensor:
        sequence = self.patch_proj(self.patch_norm(sequence))  # (batch, tokens, embed_dim)
        neighbours = F.gelu(self.pos_conv(sequence.mT)[:, :, :-1]).mT
        return self.input_norm(sequence + neighbours)

    def attention_bias(self, sequence: Tensor) -> Tensor:
        return _position_bias(self.relative_bias, sequence.shape[1], _MAX_DISTANCE)

    def pool(self, sequence: Tensor) -> Tensor:
        return sequence.mean(dim=1)  # the original averages the tokens' logits, which is the same


class GatedBiasAttention(Attention):
    """Attention whose position bias is scaled by a gate that each query computes (WavLM, arXiv:2110.13900)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads=num_heads, qkv_bias=True)
        self.position_gate = nn.Linear(dim // num_heads, 8)
        self.position_scale = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, dim) → the same; `attn_mask` is the position bias, (heads, queries, keys)."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if attn_mask is None else (self.gate_of(queries) * attn_mask).to(queries.dtype)
        if self.fused_attn:
            heard = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        else:
            scores = (queries * self.scale) @ keys.mT  # (batch, heads, queries, keys)
            heard = (scores if bias is None else scores + bias).softmax(dim=-1) @ values
        return self.proj(heard.transpose(1, 2).flatten(2))

    def gate_of(self, queries: Tensor) -> Tensor:
        """(batch, heads, queries, head dim) → (batch, heads, queries, 1), from 1 up."""
        opened, scaled = self.position_gate(queries).unflatten(-1, (2, 4)).sum(-1).float().sigmoid().split(1, dim=-1)
        return opened * (scaled * self.position_scale - 1.0) + 2.0


def _position_bias(by_bucket: Tensor, tokens: int, max_distance: int) -> Tensor:
    """Returns what is added to the scores of a sequence, before each block's gates: (heads, queries, keys).

    Distances are sorted into buckets, half of them for keys behind the query: exact ones when near, then ever wider.

    Args:
        by_bucket: (buckets, heads).
        tokens: length of the sequence.
        max_distance: from here on all distances are one.
    """
    half, exact = by_bucket.shape[0] // 2, by_bucket.shape[0] // 4
    distances = torch.arange(1 - tokens, tokens, device=by_bucket.device)  # of a key from its query
    near = distances.abs()
    rise = (near.clamp_min(1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (rise * (half - exact)).long()).clamp_max(half - 1)
    buckets = (distances > 0) * half + torch.where(near < exact, near, far)
    by_distance = by_bucket[buckets].T  # (heads, distances)
    places = torch.arange(tokens, device=by_bucket.device)
    return by_distance[:, places - places[:, None] + (tokens - 1)]


torch.fx.wrap("_position_bias")  # its size follows from the input's


def _finish(tensors: dict[str, Tensor], beside: Mapping[str, object]) -> dict[str, Tensor]:
    """Fuse projections, multiply the convolution's norm and direction, and sort the classes as AudioSet does."""
    for key in [key for key in tensors if ".attn.q_proj." in key]:
        parts = [tensors.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        tensors[key.replace("q_proj", "qkv")] = torch.cat(parts)
    if "pos_conv.weight_v" in tensors:
        direction, length = tensors.pop("pos_conv.weight_v").float(), tensors.pop("pos_conv.weight_g").float()
        tensors["pos_conv.weight"] = direction * (length / direction.norm(dim=(0, 1), keepdim=True))
    biases = [key for key in tensors if key.endswith(".attn.relative_attention_bias.weight")]  # one, under many names
    for key in biases:
        tensors["relative_bias"] = tensors.pop(key)
    order = _audioset_order(beside.get("label_dict"))
    if order is not None:
        tensors |= {key: tensors[key][order] for key in ("head.1.weight", "head.1.bias")}
    return tensors


def _audioset_order(labels: object) -> Tensor | None:
    """Returns where in a file's own list each of AudioSet's classes stands; None where its list is another one."""
    if not isinstance(labels, Mapping):
        return None
    places = {str(label): int(place) for place, label in labels.items()}
    if places.keys() != set(class_ids()) or sorted(places.values()) != list(range(len(places))):
        return None
    return torch.tensor([places[label] for label in class_ids()])


SPELLING = Spelling(
    anchor=re.compile(r"(?P<prefix>.*?)patch_embedding\.weight"),
    renamed=(
        (r"^patch_embedding\.", "patch_embed.proj."),
        (r"^layer_norm\.", "patch_norm."),
        (r"^post_extract_proj\.", "patch_proj."),
        (r"^encoder\.pos_conv\.0\.", "pos_conv."),
        (r"^encoder\.layer_norm\.", "input_norm."),
        (r"^encoder\.layers\.", "blocks."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.final_layer_norm\.", ".norm2."),
        (r"\.(fc[12])\.", r".mlp.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.self_attn\.grep_linear\.", ".attn.position_gate."),
        (r"\.self_attn\.grep_a$", ".attn.position_scale"),
        (r"\.self_attn\.", ".attn."),
        (r"^predictor\.", "head.1."),
    ),
    finish=_finish,
)
