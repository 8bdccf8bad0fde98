"""What timm's users lean on, for all students at once: its names for parts, heads, features and depths.

timm itself is not imported: it takes seconds, and a student needs nothing of it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student.heads import Head
from student.tracing import Scriptable

FeatureLocation = Literal["stage", "block"]
STAGE_ENDS = (1, 3, 6, 12, 15)
"""The blocks whose outputs are the five stages; 0 is the first convolution, 16 the last one."""


class TimmModel(Scriptable, ABC):
    """The part of a student that timm's tools and scripts call; see docs/timm.md."""

    classifier: Head
    num_classes: int
    feature_info: list[dict[str, Any]]
    """What `forward_intermediates` and timm's `features_only` can give: channels, reduction, module."""

    block_info: list[dict[str, Any]]
    """The same for each of `blocks_in_order`."""

    pools = True
    """Whether maps become vectors; without classes they may stay as they are."""

    grad_checkpointing = False

    @abstractmethod
    def blocks_in_order(self) -> list[nn.Module]:
        """Returns the first convolution, the 15 blocks and the last convolution, numbered as upstream does."""

    @abstractmethod
    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Turn the network's maps into logits."""

    def set_feature_location(self, location: FeatureLocation) -> None:
        """Choose what indices of features count: the five stages, or all blocks, 0 to 16.

        Raises:
            ValueError: there is no such location.
        """
        if location not in get_args(FeatureLocation):
            raise ValueError(f"feature_location is {location!r}; choose one of {', '.join(get_args(FeatureLocation))}")
        self._feature_blocks = STAGE_ENDS if location == "stage" else tuple(range(len(self.block_info)))
        self.feature_info = [dict(self.block_info[number]) for number in self._feature_blocks]

    def run_blocks(self, maps: Tensor, taken: Sequence[int] = (), stop: int | None = None) -> tuple[Tensor, dict]:
        """Run (batch, 1, mels, frames) through the blocks up to `stop`; returns the last maps, and those of `taken`."""
        saves_memory = self.grad_checkpointing and torch.is_grad_enabled()
        found = {}
        for number, block in enumerate(self.blocks_in_order()):
            if saves_memory:
                again = partial(_contexts, block)
                maps = cast("Tensor", checkpoint(block, maps, use_reentrant=False, context_fn=again))
            else:
                maps = block(maps)
            if number in taken:
                found[number] = maps
            if number == stop:
                break
        return maps, found

    def forward_features(self, features: Tensor) -> Tensor:
        """Run the network: (batch, 1, mels, frames) → (batch, num_features, mels / 32, frames / 32)."""
        return self.run_blocks(features)[0]

    def forward_intermediates(
        self,
        features: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns the maps of stages or blocks, beside those that `forward_features` returns.

        Args:
            features: (batch, 1, mels, frames), from `front_end`.
            indices: which of `feature_info`, from the end where negative; an int is the last so many, None is all.
            norm: does nothing: every block ends with its normalisation.
            stop_early: leave out the blocks behind the last that is asked for.
            output_fmt: "NCHW": (batch, channels, mels, frames).
            intermediates_only: return the list alone.

        Raises:
            ValueError: there is no such stage, block or format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, but maps are NCHW")
        taken = [self._feature_blocks[number] for number in self._places(indices)]
        maps, found = self.run_blocks(features, taken, max(taken) if stop_early else None)
        outputs = [found[number] for number in taken]
        return outputs if intermediates_only else (maps, outputs)

    def _places(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self._feature_blocks)
        if indices is None:
            return list(range(count))
        wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not wanted or not all(-count <= number < count for number in wanted):
            raise ValueError(f"indices are {wanted}; choose from {-count} to {count - 1}")
        return [number % count for number in wanted]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block a second time in the backward pass rather than keep what lies between its layers."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Returns the layers that depend on the number of classes; an `Identity` without classes."""
        layers = [self.classifier.get_submodule(name) for name in self.classifier.final_layers]
        return layers[0] if len(layers) == 1 or not self.num_classes else nn.Sequential(*layers)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head's last layer by a fresh one; with 0 classes the model returns that layer's input.

        Args:
            num_classes: size of the output.
            global_pool: "" with 0 classes: the model returns the maps, not pooled. None or "avg" pools as ever.

        Raises:
            ValueError: another pooling is asked for; each head has its own.
        """
        self.pools = is_pooled(global_pool, num_classes)
        self.num_classes = num_classes
        self.classifier.reset(num_classes)
        self.classifier.to(next(self.parameters()).device)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns each parameter's depth, in timm's words, for layer-wise learning rates.

        Args:
            coarse: stages rather than blocks.
        """
        names = {id(module): name for name, module in self.named_modules()}
        first, *blocks, last = (re.escape(names[id(block)]) for block in self.blocks_in_order())
        ends = STAGE_ENDS if coarse else range(1, len(blocks) + 1)
        depths = [sum(end < number for end in ends) for number in range(1, len(blocks) + 1)]
        groups = [(rf"^{block}\.", (depth,)) for block, depth in zip(blocks, depths, strict=True)]
        return {"stem": rf"^{first}\.", "blocks": [*groups, (rf"^{last}\.", (depths[-1],))]}


def is_pooled(global_pool: str | None, num_classes: int) -> bool:
    """Whether maps are pooled, by timm's word for it: "" is no pooling.

    Raises:
        ValueError: it is another one than the head's, or none although there are classes.
    """
    if global_pool in (None, "avg"):
        return True
    if global_pool == "" and not num_classes:
        return False
    raise ValueError(
        f"global_pool is {global_pool!r}, but the pooling belongs to the head: choose head_type; '' goes with "
        "num_classes=0 alone"
    )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch again, while a block is computed a second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
