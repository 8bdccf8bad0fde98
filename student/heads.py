"""From feature maps to class logits: the three heads, under the parameter names of EfficientAT's checkpoints.

Every head offers the same four things: `forward` (maps to logits), `frame_logits` (maps to the logits of each of their
frames), `pre_logits` (maps to the vector that the last layer sees) and `reset` (a fresh last layer). `final_layers`
names the modules that depend on the number of classes.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from student.layers import GlobalAveragePool, init_weights

HeadType = Literal["mlp", "fully_convolutional", "multihead_attention_pooling"]


class MlpHead(nn.Sequential):
    """Mean over the image, one hidden layer, one output layer."""

    final_layers = ("5",)

    def __init__(self, in_features: int, hidden_features: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            GlobalAveragePool(),
            nn.Flatten(),
            nn.Linear(in_features, hidden_features),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout),
        )
        self.hidden_features = hidden_features
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the output layer by a fresh one; with 0 classes the hidden layer becomes the output."""
        self.add_module("5", nn.Linear(self.hidden_features, num_classes) if num_classes else nn.Identity())
        init_weights(self[5])

    def pre_logits(self, maps: Tensor) -> Tensor:
        """Stop before the output layer: (batch, channels, mels, frames) → (batch, hidden_features)."""
        for layer in list(self)[:-1]:
            maps = layer(maps)
        return maps

    def frame_logits(self, maps: Tensor) -> Tensor:
        """Take each frame for an image of its own: (batch, channels, mels, frames) → (batch, frames, classes)."""
        frames = maps.mean(dim=2).transpose(1, 2)  # (batch, frames, channels)
        for layer in list(self)[2:]:
            frames = layer(frames)
        return frames


class FullyConvolutionalHead(nn.Sequential):
    """A logit at every position of the image, then their mean; works on any size and can be read over time."""

    final_layers = ("0", "1")

    def __init__(self, in_features: int, num_classes: int) -> None:
        # Positions are averaged after the normalisation; its eps is torch's default, unlike the network's.
        super().__init__(nn.Identity(), nn.Identity(), GlobalAveragePool(), nn.Flatten())
        self.hidden_features = in_features
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the output layer by a fresh one; with 0 classes the mean of the maps becomes the output."""
        self[0] = nn.Conv2d(self.hidden_features, num_classes, 1, bias=False) if num_classes else nn.Identity()
        self[1] = nn.BatchNorm2d(num_classes) if num_classes else nn.Identity()
        init_weights(self[0])
        init_weights(self[1])

    def pre_logits(self, maps: Tensor) -> Tensor:
        """Average the maps: (batch, channels, mels, frames) → (batch, channels)."""
        return maps.mean(dim=(2, 3))

    def frame_logits(self, maps: Tensor) -> Tensor:
        """Leave out the mean over the frames: (batch, channels, mels, frames) → (batch, frames, classes)."""
        return self[1](self[0](maps)).mean(dim=2).transpose(1, 2)


class AttentionPoolingHead(nn.Module):
    """Each head weighs the frames for each class by its own attention; the heads are added with learned weights.

    As in PSLA: Gong et al. 2021, arXiv:2102.01243, Section III-B.
    """

    final_layers = ("subspace_proj",)

    def __init__(self, in_features: int, num_classes: int, heads: int) -> None:
        super().__init__()
        self.hidden_features, self.heads = in_features, heads
        self.head_weight = nn.Parameter(torch.full((1, heads, 1), 1.0 / heads))
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the projection by a fresh one; with 0 classes the mean of the maps becomes the output."""
        self.num_classes = num_classes
        outputs = 2 * self.heads * num_classes  # attention and value of every head and class
        self.subspace_proj = nn.Linear(self.hidden_features, outputs) if num_classes else nn.Identity()
        init_weights(self.subspace_proj)

    def pre_logits(self, maps: Tensor) -> Tensor:
        """Average the maps: (batch, channels, mels, frames) → (batch, channels)."""
        return maps.mean(dim=(2, 3))

    def frame_logits(self, maps: Tensor) -> Tensor:
        """Leave the attention out: (batch, channels, mels, frames) → (batch, frames, classes)."""
        frames = maps.mean(dim=2).transpose(1, 2)  # (batch, frames, channels)
        values = self.subspace_proj(frames).unflatten(-1, (2, self.heads, self.num_classes))[:, :, 1].float()
        return (values * self.head_weight).sum(dim=2)

    def forward(self, maps: Tensor) -> Tensor:
        """Pool the frames: (batch, channels, mels, frames) → (batch, classes)."""
        if not self.num_classes:
            return self.pre_logits(maps)
        frames = maps.mean(dim=2).transpose(1, 2)  # (batch, frames, channels)
        split = self.subspace_proj(frames).unflatten(-1, (2, self.heads, self.num_classes))
        attention, values = split.float().unbind(dim=2)  # both (batch, frames, heads, classes)
        attention = attention.sigmoid().clamp(1e-7, 1 - 1e-7)
        attention = attention / attention.sum(dim=1, keepdim=True)
        pooled = (attention * values).sum(dim=1)  # (batch, heads, classes)
        return (pooled * self.head_weight).sum(dim=1)


Head = MlpHead | FullyConvolutionalHead | AttentionPoolingHead


_HEADS: Mapping[str, type[Head]] = {
    "mlp": MlpHead,
    "fully_convolutional": FullyConvolutionalHead,
    "multihead_attention_pooling": AttentionPoolingHead,
}


def head_class(head_type: str) -> type[Head]:
    """Returns the head of EfficientAT's name for it.

    Raises:
        ValueError: there is no such head.
    """
    if head_type not in _HEADS:
        raise ValueError(f"head_type is {head_type!r}; choose one of {', '.join(_HEADS)}")
    return _HEADS[head_type]


def build_head(
    head_type: HeadType, in_features: int, hidden_features: int, num_classes: int, dropout: float, attention_heads: int
) -> Head:
    """Build a head by EfficientAT's name for it.

    Raises:
        ValueError: there is no such head.
    """
    head = head_class(head_type)
    if head is MlpHead:
        return MlpHead(in_features, hidden_features, num_classes, dropout)
    if head is FullyConvolutionalHead:
        return FullyConvolutionalHead(in_features, num_classes)
    return AttentionPoolingHead(in_features, num_classes, attention_heads)
