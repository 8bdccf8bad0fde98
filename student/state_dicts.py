"""Reads checkpoints and fits them to a model; what doesn't fit is named, never skipped."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from student.weight_files import read_weights

logger = logging.getLogger(__name__)

_NESTED = ("state_dict", "model")
"""Where training scripts keep the network's state dict in theirs."""

Shapes = Mapping[str, tuple[int, ...]]


def read_checkpoint(checkpoint: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or torch file without running anything that the file brings along.

    Args:
        checkpoint: the file, or the state dict itself. A training checkpoint's "state_dict" or "model" is found, and
            what stands before the network's keys is dropped, such as "module.", or Lightning's "model.".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else than tensors.
    """
    if isinstance(checkpoint, Mapping):
        return _network_of(checkpoint, "the state dict")
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint")
    try:
        content, _ = read_weights(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint}: not a readable safetensors or torch checkpoint of tensors: it {error}"
        ) from error
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{checkpoint}: holds more than tensors; save the model's state_dict() alone")
    state_dict = {key.removeprefix("module."): value for key, value in content.items()}
    return _network_of(state_dict, str(checkpoint))


_FIRST_CONVOLUTIONS = ("features.0.0.weight", "in_c.0.weight", "conv_stem.weight")
"""Keys that MN (and torchvision's), DyMN and timm's MobileNetV3 have: what stands before is the wrapper's."""


def _network_of(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Returns the tensors of the network inside what wraps it, under the network's own keys."""
    firsts = [(key, first) for key in state_dict for first in _FIRST_CONVOLUTIONS if f".{key}".endswith(f".{first}")]
    prefixes = sorted({key.removesuffix(first) for key, first in firsts})
    if not prefixes or "" in prefixes:
        return dict(state_dict)
    prefix = next((one for one in prefixes if "swa" in one or "ema" in one), prefixes[0])  # averaged weights
    network = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if left := [key for key in state_dict if not key.startswith(prefix)]:
        logger.info(
            "%s: took the %d tensors under %r, left %d, such as %s", source, len(network), prefix, len(left), left[0]
        )
    return network


def fit_to_model(state_dict: Mapping[str, Tensor], model: nn.Module, final_layers: Iterable[str]) -> dict[str, Tensor]:
    """Make a state dict that `model` loads strictly; a last layer of another size stays as fresh as it is.

    A model without classes has no last layer: the checkpoint's is left aside.

    Args:
        state_dict: the checkpoint's tensors.
        model: the model to load them into.
        final_layers: names of the modules whose shape follows from the number of classes.

    Raises:
        ValueError: keys are missing or unknown, or shapes differ elsewhere than in the last layer.
    """
    own = model.state_dict()
    prefixes = tuple(f"{layer}." for layer in final_layers)
    fitted = dict(state_dict)
    if not any(key.startswith(prefixes) for key in own):
        fitted = {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}
    resized = [key for key in own if key.startswith(prefixes) and key in fitted and fitted[key].shape != own[key].shape]
    final_keys = [key for key in own if key.startswith(prefixes)] if resized else []
    for key in final_keys:
        fitted[key] = own[key]
    if difference := describe_difference(shapes_of(own), shapes_of(fitted)):
        raise ValueError(difference)
    if resized:
        logger.warning(
            "The checkpoint knows %d classes, the model %d: its last layer (%s) starts anew",
            len(state_dict[resized[0]]),
            len(own[resized[0]]),
            ", ".join(final_keys),
        )
    return fitted


def shapes_of(state_dict: Mapping[str, Tensor]) -> Shapes:
    """List the shape of every tensor."""
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def describe_difference(expected: Shapes, found: Shapes, max_shown: int = 5) -> str:
    """Returns in one line which keys and shapes differ, at most `max_shown` of each kind; empty if none does."""
    kinds = {
        "missing": [f"{key} {expected[key]}" for key in expected if key not in found],
        "unknown": [f"{key} {found[key]}" for key in found if key not in expected],
        "of another shape": [
            f"{key} {found[key]} instead of {expected[key]}"
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    parts = [
        f"{len(keys)} {kind}: {', '.join(keys[:max_shown])}{', …' if len(keys) > max_shown else ''}"
        for kind, keys in kinds.items()
        if keys
    ]
    return "; ".join(parts)
