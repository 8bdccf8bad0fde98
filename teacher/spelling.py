"""How a family's authors name the tensors of their checkpoints."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Finish = Callable[[dict[str, Tensor], Mapping[str, object]], dict[str, Tensor]]
"""Tensors under our names, and what the file holds beside the state dict → the tensors that our model takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """The names in the files of one family; keys that aren't renamed keep their names."""

    anchor: re.Pattern[str]
    """Matches the whole key of the patches' weights, which no other family's files have; what its group `prefix` holds
    wraps the network, and what does not begin with it is no part of it."""

    renamed: tuple[tuple[str, str], ...]
    """Patterns in keys, and what takes their place here; one after the other."""

    unused: tuple[str, ...] = ()
    """What keys begin with, once they are renamed, that no forward pass uses."""

    finish: Finish = lambda tensors, _: tensors
    """What is more than a renaming."""

    def prefix(self, keys: Mapping[str, object]) -> str | None:
        """Returns what wraps the network in a file with these keys; None where they aren't of this family."""
        return next((match["prefix"] for key in keys if (match := self.anchor.fullmatch(key))), None)

    def translate(self, tensors: Mapping[str, Tensor], beside: Mapping[str, object]) -> dict[str, Tensor]:
        """Returns the tensors under our names; `prefix` is gone from their keys already.

        Args:
            tensors: of the network.
            beside: what the file holds beside its state dict.
        """
        ours = {}
        for key, value in tensors.items():
            name = key
            for pattern, replacement in self.renamed:
                name = re.sub(pattern, replacement, name)
            if not name.startswith(self.unused):
                ours[name] = value
        return self.finish(ours, beside)
