"""A spectrogram cut into patches, and the patches that a training step leaves out."""

import torch
from torch import Generator, Tensor, nn


class PatchEmbed(nn.Module):
    """Perhaps overlapping patches of a one-channel spectrogram, each turned into a vector by one linear map."""

    def __init__(self, patch: tuple[int, int], stride: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, kernel_size=patch, stride=stride, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, mels, frames) → (batch, embed_dim, frequency patches, time patches)."""
        return self.proj(without_channel(features).unsqueeze(1).to(self.proj.weight.dtype))


def without_channel(features: Tensor) -> Tensor:
    """(batch, mels, frames), or timm's (batch, 1, mels, frames) → (batch, mels, frames).

    Raises:
        ValueError: the shape is another.
    """
    return _three_axes(features)


def _three_axes(features: Tensor) -> Tensor:
    if features.dim() == 4 and features.shape[1] == 1:
        features = features[:, 0]
    if features.dim() != 3:
        raise ValueError(f"features have shape {list(features.shape)}; give (batch, mels, frames)")
    return features


torch.fx.wrap("_three_axes")  # a graph checks as well


def drop_patches(
    grid: Tensor, *, time: int, frequency: int, unstructured: int, generator: Generator | None = None
) -> Tensor:
    """Leave out random patches and line the rest up as a sequence (patchout).

    It makes a training step cheaper and regularises; one choice holds for the whole batch.

    Args:
        grid: (batch, embed_dim, frequency patches, time patches), position encodings added.
        time: how many columns of the grid (moments) to leave out.
        frequency: how many rows of the grid (bands) to leave out.
        unstructured: how many single patches to leave out of what then remains.
        generator: where the choice comes from; None is torch's global one.

    Returns:
        (batch, patches, embed_dim).

    Raises:
        ValueError: nothing would be left.

    Koutini et al. 2022, arXiv:2110.05069, Section 2.2.
    """
    if time:
        grid = _drop(grid, 3, "time", time, generator)
    if frequency:
        grid = _drop(grid, 2, "frequency", frequency, generator)
    sequence = grid.flatten(2).transpose(1, 2)  # (batch, patches, embed_dim)
    return _drop(sequence, 1, "single", unstructured, generator) if unstructured else sequence


def _drop(values: Tensor, axis: int, name: str, count: int, generator: Generator | None) -> Tensor:
    size = values.shape[axis]
    if not 0 < count < size:
        raise ValueError(f"patchout.{name} is {count}, and there are {size}; choose from 0 to {size - 1}")
    device = generator.device if generator is not None else None
    kept = torch.randperm(size, generator=generator, device=device)[count:].sort().values
    return values.index_select(axis, kept.to(values.device))
