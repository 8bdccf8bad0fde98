"""Networks whose weights a checkpoint brings: others need not be drawn first, which takes half a second for mn40."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

_DRAWS = ("normal_", "uniform_", "kaiming_uniform_")
"""Of tensors, and of `torch.nn.init`; its other functions for random weights call the tensors' own."""


class Undrawn(TorchFunctionMode):
    """Within this context, tensors that would be filled with random numbers stay as they are: with any numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call one of torch's functions, unless it would draw."""
        return None if func.__name__ in _DRAWS else func(*args, **(kwargs or {}))
