"""Squeeze-and-excitation over channels, mel bands or frames, alone or side by side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from student.layers import global_average_pool, make_divisible

SeAggregation = Literal["max", "avg", "add", "min"]

AXES: Mapping[str, int] = {"c": 1, "f": 2, "t": 3}
_AGGREGATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max": lambda gated: gated.amax(dim=0),
    "avg": lambda gated: gated.mean(dim=0),
    "add": lambda gated: gated.sum(dim=0),
    "min": lambda gated: gated.amin(dim=0),
}


class SqueezeExcitation(nn.Module):
    """Scales every place along one axis by a gate computed from the means along that axis (arXiv:1709.01507)."""

    def __init__(self, size: int, axis: int, reduction: int) -> None:
        super().__init__()
        squeezed = make_divisible(size // reduction, 8)
        self.fc1 = nn.Linear(size, squeezed)
        self.fc2 = nn.Linear(squeezed, size)
        self.size, self.axis = size, axis
        self.other_axes = tuple(other for other in (1, 2, 3) if other != axis)

    def forward(self, maps: Tensor) -> Tensor:
        """Gate (batch, channels, mels, frames); the shape stays.

        Raises:
            ValueError: the axis has another size than the layer was built for.
        """
        maps = _exact_size(maps, self.axis, self.size)
        means = global_average_pool(maps) if self.axis == 1 else maps.mean(dim=self.other_axes)  # (batch, size)
        gate = self.fc2(self.fc1(means).relu()).sigmoid()
        shape = [maps.shape[0], 1, 1, 1]
        shape[self.axis] = self.size
        return maps * gate.view(shape)


def _exact_size(maps: Tensor, axis: int, size: int) -> Tensor:
    if maps.shape[axis] != size:
        raise ValueError(
            f"squeeze-excitation was built for {size} places along axis {axis}, not {maps.shape[axis]}: create the "
            "model with input_dim_f or input_dim_t of its input"
        )
    return maps


torch.fx.wrap("_exact_size")  # a graph checks as well


class ConcurrentSqueezeExcitation(nn.Module):
    """Squeeze-excitations over several axes of the same maps, aggregated place by place."""

    def __init__(self, sizes: Sequence[int], axes: str, aggregation: SeAggregation, reduction: int) -> None:
        """Build one gate for each of `axes`.

        Args:
            sizes: channels, mel bands and frames of the maps.
            axes: letters out of "c", "f" and "t".
            aggregation: how the gated maps become one.
            reduction: a gate's hidden layer is this many times smaller than its axis.
        """
        super().__init__()
        self.conc_se_layers = nn.ModuleList(
            SqueezeExcitation(sizes[AXES[axis] - 1], AXES[axis], reduction) for axis in axes
        )
        self.aggregation = aggregation

    def forward(self, maps: Tensor) -> Tensor:
        """Gate (batch, channels, mels, frames); the shape stays."""
        if len(self.conc_se_layers) == 1:
            return self.conc_se_layers[0](maps)
        return _AGGREGATIONS[self.aggregation](torch.stack([gate(maps) for gate in self.conc_se_layers]))


def check_squeeze_excitation(axes: str, aggregation: str, reduction: int) -> None:
    """Refuse settings that no squeeze-excitation can be built from.

    Raises:
        ValueError: an axis or an aggregation is unknown, or the reduction is below 1.
    """
    if axes != "none" and (not axes or len(set(axes)) != len(axes) or not set(axes) <= set(AXES)):
        raise ValueError(f"se_dims is {axes!r}; choose letters out of c, f and t, each once, or none")
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"se_agg is {aggregation!r}; choose one of {', '.join(_AGGREGATIONS)}")
    if reduction < 1:
        raise ValueError(f"se_r is {reduction}; choose 1 or more")
