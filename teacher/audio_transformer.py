"""What all families share: patches of a spectrogram go through a ViT, are pooled and classified.

A family says in the methods named `build_…`, `grid_of`, `before_blocks` and `pool` where it departs from that.
"""

from abc import abstractmethod
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from teacher.front_ends import FrontEnd
from teacher.patches import PatchEmbed, drop_patches, without_channel
from teacher.timm_model import TimmModel
from teacher.tracing import is_traced

_TOKENS_AT_ONCE = 4096
"""Through the blocks, on a CPU; three clips of PaSST-S. From 1200 to 9500 make no difference in speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """The shape of an audio transformer, and what its training leaves out."""

    embed_dim: int = 768
    """Width of the sequence."""

    depth: int = 12
    """Number of transformer blocks."""

    num_heads: int = 12
    """Attention heads; they divide `embed_dim`."""

    mels: int = 128
    """Mel bands of the features."""

    frames: int
    """Frames that the position encodings are made for."""

    patch: int = 16
    """Side of a patch, in mel bands and frames."""

    stride: int = 10
    """Distance between patches, in mel bands and frames; below `patch`, patches overlap."""

    whole_band: bool = False
    """Patches span all mel bands and `patch` frames, as SSAST's frame patches do (arXiv:2110.09784). From few clips a
    model learns far more with them than with square ones."""

    norm_eps: float = 1e-6
    """Epsilon of the layer norms in and after the blocks."""

    head_norm_eps: float = 1e-5
    """Epsilon of the layer norm in the classifier."""

    s_patchout_t: int = 0
    """Time columns of the patch grid that a training step leaves out."""

    s_patchout_f: int = 0
    """Frequency rows of the patch grid that a training step leaves out."""

    u_patchout: int = 0
    """Single patches that a training step leaves out after the rows and columns."""

    drop_rate: float = 0.0
    """Share of the pooled vector that a training step leaves out before the last layer, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate <= 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; choose a value from 0 to 1")
        for field in ("embed_dim", "depth", "num_heads", "mels", "frames", "patch", "stride"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; choose 1 or more")
        for field in ("s_patchout_t", "s_patchout_f", "u_patchout"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; choose 0 or more")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide embed_dim {self.embed_dim}")

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Mel bands and frames of a patch."""
        return (self.mels if self.whole_band else self.patch), self.patch

    @property
    def frequency_rows(self) -> int:
        """Frequency encodings of the families that have them; their authors' count, from the stride alone."""
        return 1 if self.whole_band else self.mels // self.stride


class AudioTransformer(TimmModel):
    """Base of all families; each adds its position encodings, its extra tokens and its pooling.

    Features may have a channel axis of 1, as timm's images have one: (batch, 1, …).

    Attributes:
        front_end: (batch, samples) float32 waveforms at `sample_rate_hz` → the features that `forward` takes.
        model_name: the registered name.
        sample_rate_hz: of the waveforms.
        input_seconds: the longest clip that the model looks at as a whole.
        num_classes: classes of the logits.
    """

    front_end: FrontEnd
    model_name: str = ""
    input_seconds: float = 10.0

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; choose 0 or more")
        self.config = config
        self.num_classes = num_classes
        self.num_features = self.embed_dim = config.embed_dim
        self.patch_embed = self.build_patch_embed()
        self.blocks = nn.Sequential(*(self.build_block() for _ in range(config.depth)))
        self.norm = self.build_norm()
        last = nn.Linear(self.pooled_dim, num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(self.build_head_norm(), last)
        self.head_drop = nn.Dropout(config.drop_rate)

    @property
    def pooled_dim(self) -> int:
        """Width of the vector that is classified."""
        return self.config.embed_dim

    def build_patch_embed(self) -> PatchEmbed:
        """Returns what turns (batch, mels, frames) into (batch, embed_dim, frequency patches, time patches)."""
        return PatchEmbed(self.config.patch_shape, self.config.stride, self.config.embed_dim)

    def build_block(self) -> nn.Module:
        """Returns one block."""
        config = self.config
        norm_layer: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        return Block(config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=norm_layer)

    def build_norm(self) -> nn.Module:
        """Returns what normalises the sequence behind the last block."""
        return nn.LayerNorm(self.config.embed_dim, eps=self.config.norm_eps)

    def build_head_norm(self) -> nn.Module:
        """Returns what normalises the pooled vector before it is classified."""
        return nn.LayerNorm(self.config.embed_dim, eps=self.config.head_norm_eps)

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveforms that the front end takes."""
        return self.front_end.config.sample_rate_hz

    def forward(self, features: Tensor, generator: Generator | None = None, frames: Tensor | None = None) -> Tensor:
        """Tag clips.

        Args:
            features: what `front_end` gives.
            generator: where patchout draws from in training mode; None is torch's global generator.
            frames: (batch,), on the CPU: how many of each clip's frames are its own, which `front_end.frames` counts;
                None is all of them.

        Returns:
            (batch, classes), before the sigmoid, float32 also under autocast.
        """
        if is_traced(features):
            generator = None  # a graph draws from torch's own
        return self.forward_head(self.forward_features(features, generator))

    def forward_features(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        """Features → (batch, tokens, embed_dim), normalised output of the last block."""
        return self.encode(*self.grid_of(features, generator), generator)

    @abstractmethod
    def pool(self, sequence: Tensor) -> Tensor:
        """(batch, tokens, embed_dim) → (batch, pooled_dim)."""

    def forward_head(self, sequence: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the sequence and classify it.

        Args:
            sequence: (batch, tokens, embed_dim).
            pre_logits: stop at the pooled vector, the clip's embedding.

        Returns:
            (batch, classes), or (batch, pooled_dim) with `pre_logits` and without classes.
        """
        if not self.pools:
            return sequence
        # The last layer costs nothing, and bfloat16 would round a logit of 5 to steps of 0.03.
        with nullcontext() if is_traced(sequence) else torch.autocast(sequence.device.type, enabled=False):
            pooled = self.pool(sequence.to(self.patch_embed.proj.weight.dtype))  # (batch, pooled_dim)
            return pooled if pre_logits else self.classify(pooled)

    def classify(self, pooled: Tensor) -> Tensor:
        """(batch, pooled_dim) → (batch, classes), before the sigmoid; without classes the vectors as they are."""
        if not self.num_classes:
            return pooled
        norm, last = self.head
        return last(self.head_drop(norm(pooled)))

    def encode(self, grid: Tensor, tokens: Tensor | None, generator: Generator | None) -> Tensor:
        """Run the blocks over the extra tokens and the patches.

        Args:
            grid: (batch, embed_dim, frequency patches, time patches), position encodings added.
            tokens: (1, extra tokens, embed_dim), position encodings added; they go first.
            generator: see `forward`.

        Returns:
            (batch, tokens, embed_dim).
        """
        time, single = self.patchout(grid.shape[-1]) if self.training else (0, 0)
        sequence = drop_patches(
            grid,
            time=time,
            frequency=self.config.s_patchout_f if self.training else 0,
            unstructured=single,
            generator=generator,
        )  # (batch, patches, embed_dim)
        if tokens is not None:
            sequence = torch.cat([tokens.expand(sequence.shape[0], -1, -1), sequence], dim=1)
        if is_traced(sequence) or torch.is_grad_enabled() or sequence.device.type != "cpu":
            return self.finish_sequence(self.transform(sequence))
        # A processor is busy with a few clips, and what lies between the layers takes the memory of these alone.
        clips = max(1, _TOKENS_AT_ONCE // sequence.shape[1])
        return self.finish_sequence(torch.cat([self.transform(piece) for piece in sequence.split(clips)]))

    def transform(self, sequence: Tensor) -> Tensor:
        """Run the blocks over (batch, tokens, embed_dim), and normalise what comes out."""
        return self.norm(self.run_blocks(sequence)[0])

    def run_blocks(
        self, sequence: Tensor, taken: Collection[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        sequence = self.before_blocks(sequence)
        bias = self.attention_bias(sequence)
        saves_memory = self.grad_checkpointing and torch.is_grad_enabled() and not is_traced(sequence)
        found = {}
        for number, block in enumerate(self.blocks):
            if number == depth:
                break
            if saves_memory:
                sequence = cast("Tensor", checkpoint(block, sequence, bias, use_reentrant=False))
            else:
                sequence = block(sequence, bias)
            if number in taken:
                found[number] = sequence
        return sequence, found

    def before_blocks(self, sequence: Tensor) -> Tensor:
        """Returns what goes into the first block, (batch, tokens, embed_dim)."""
        return sequence

    def attention_bias(self, sequence: Tensor) -> Tensor | None:
        """Returns what is added to the scores of every block's attention, (heads, queries, keys)."""
        return None

    def patchout(self, time_patches: int) -> tuple[int, int]:
        """Returns how many columns, and then how many single patches, a training step leaves out of a grid."""
        return self.config.s_patchout_t, self.config.u_patchout

    def exact_frames(self, features: Tensor) -> Tensor:
        """Returns (batch, frames, mels), of exactly the frames that the encodings are made for.

        Raises:
            ValueError: the features have others.
        """
        config = self.config
        return _exact_frames(without_channel(features), config.frames, config.mels, self.model_name or "this network")


def _exact_frames(features: Tensor, frames: int, mels: int, name: str) -> Tensor:
    if features.shape[1] != frames or features.shape[2] != mels:
        raise ValueError(
            f"features have shape ({features.shape[0]}, {features.shape[1]}, {features.shape[2]}), but {name} takes "
            f"(batch, {frames} frames, {mels} mels), as its front end gives them"
        )
    return features


torch.fx.wrap("_exact_frames")  # a graph checks as well
