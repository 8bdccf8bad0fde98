"""What timm's users lean on, for all families at once: its names for parts, heads, features and depths."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from timm.layers import trunc_normal_
from torch import Generator, Tensor, nn

from teacher.tracing import Scriptable

if TYPE_CHECKING:
    from teacher.audio_transformer import TransformerConfig


class TimmModel(Scriptable, ABC):
    """The part of a transformer that timm's tools and scripts call; see docs/timm.md."""

    config: "TransformerConfig"
    blocks: nn.Sequential
    norm: nn.Module
    head: nn.Sequential
    num_classes: int
    embed_dim: int
    pooled_dim: int
    pools = True
    """Whether sequences become vectors; without classes they may stay as they are."""
    takes_fixed_frames = False
    """Whether features have to have exactly the frames of the encodings."""
    grad_checkpointing = False
    time_major = False
    """Whether neighbours in the sequence are neighbours in frequency."""

    @abstractmethod
    def grid_of(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns a clip's patches and what precedes them, position encodings added.

        Args:
            features: what `front_end` gives, perhaps with a channel axis of 1.
            generator: see `AudioTransformer.forward`.

        Returns:
            The grid, (batch, embed_dim, rows, columns), and (1, tokens, embed_dim) or None.
        """

    @abstractmethod
    def run_blocks(
        self, sequence: Tensor, taken: Collection[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks over (batch, tokens, embed_dim).

        Args:
            sequence: the tokens before the patches, and the patches.
            taken: numbers of the blocks whose results are wanted.
            depth: run only so many; None is all.

        Returns:
            The last block's result, not yet normalised, and those of `taken`.
        """

    @property
    def head_hidden_size(self) -> int:
        """Width of what `forward_head(pre_logits=True)` gives."""
        return self.pooled_dim

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry a block: channels, reduction and module."""
        return [
            {"num_chs": self.embed_dim, "reduction": self.config.stride, "module": f"blocks.{number}"}
            for number in range(len(self.blocks))
        ]

    def forward_intermediates(
        self,
        features: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns what blocks give, beside the sequence that `forward_features` returns; nothing is left out.

        Args:
            features: what `front_end` gives, perhaps with a channel axis of 1; of clips of one piece.
            indices: numbers of blocks, from the end where negative; an int is the last so many, None is all.
            return_prefix_tokens: add the tokens before the patches to each block's result.
            norm: normalise them as the last block's result is.
            stop_early: leave out the blocks behind the last that is asked for.
            output_fmt: "NCHW", (batch, embed_dim, frequency patches, time patches), or "NLC", (batch, patches,
                embed_dim), frequency after frequency but for BEATs, time after time.
            intermediates_only: return the list alone.

        Raises:
            ValueError: there is no such block, or no such format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose NCHW or NLC")
        taken = block_indices(indices, len(self.blocks))
        grid, tokens = self.grid_of(features)
        sequence = grid.flatten(2).mT  # (batch, patches, embed_dim)
        prefix = 0
        if tokens is not None:
            prefix = tokens.shape[1]
            sequence = torch.cat([tokens.expand(grid.shape[0], -1, -1), sequence], dim=1)
        sequence, found = self.run_blocks(sequence, taken, max(taken) + 1 if stop_early else None)
        outputs = []
        for number in taken:
            output = self.norm(found[number]) if norm else found[number]
            before, patches = output[:, :prefix], output[:, prefix:]
            if output_fmt == "NCHW":
                patches = patches.mT.unflatten(2, grid.shape[2:])
                patches = (patches.mT if self.time_major else patches).contiguous()
            outputs.append((patches, before) if return_prefix_tokens else patches)
        return outputs if intermediates_only else (self.finish_sequence(self.norm(sequence)), outputs)

    def finish_sequence(self, sequence: Tensor) -> Tensor:
        """Returns the tokens that are pooled, of all that went through the blocks: (batch, tokens, embed_dim)."""
        return sequence

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last that is asked for; returns the numbers of those that are."""
        taken = block_indices(indices, len(self.blocks))
        self.blocks = nn.Sequential(*list(self.blocks)[: max(taken) + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block a second time in the backward pass rather than keep what lies between its layers."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Returns the last linear layer; an `Identity` without classes."""
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a fresh one for another number of classes.

        Args:
            num_classes: with 0 the model returns the clips' embeddings, as `forward_head(pre_logits=True)` does.
            global_pool: "" with 0 classes: the model returns the sequence, not pooled. None pools as the family does.

        Raises:
            ValueError: another pooling than the family's is asked for, or none but classes.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; choose 0 or more")
        self.pools = is_pooled(global_pool, num_classes)
        like = self.get_parameter("patch_embed.proj.weight")
        fresh = nn.Linear(self.pooled_dim, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head[-1] = nn.Identity() if fresh is None else fresh
        init_linear(self.head[-1])
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns each parameter's depth, in timm's words, for layer-wise learning rates.

        Args:
            coarse: all blocks are one group.
        """
        return {
            "stem": r"^(?:cls_token|dist_token|\w*pos_embed|patch_\w+|pos_conv|relative_bias|init_bn|input_norm)",
            "blocks": r"^(?:blocks|norm)\." if coarse else [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters without weight decay: tokens and position encodings."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def init_weights(self) -> Self:
        """Draw fresh weights as DeiT does: truncated normal, deviation 0.02, biases 0; the patches keep torch's own."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return self  # shapes alone, and torch would take as long as for numbers
        for parameter in self.parameters(recurse=False):  # tokens and position encodings
            trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)
        return self


def is_pooled(global_pool: str | None, num_classes: int) -> bool:
    """Whether sequences are pooled, by timm's word for it: "" is no pooling, and None is the family's own.

    Raises:
        ValueError: it is another one, or none although there are classes.
    """
    if global_pool is None:
        return True
    if global_pool == "" and not num_classes:
        return False
    raise ValueError(
        f"global_pool is {global_pool!r}: each family pools in its own way, so leave it out; '' goes with num_classes=0"
    )


def block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Returns numbers of blocks, counted from the front.

    Raises:
        ValueError: there is no such block.
    """
    if indices is None:
        return list(range(depth))
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or not all(-depth <= number < depth for number in wanted):
        raise ValueError(f"indices are {wanted}; there are {depth} blocks: choose from {-depth} to {depth - 1}")
    return [number % depth for number in wanted]


def init_linear(module: nn.Module) -> None:
    """Draw fresh weights for one module; use with `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
