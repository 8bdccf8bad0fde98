"""What a teacher costs: parameters, and floating-point operations for one clip of its full length.

Nothing is computed: models of one and of two blocks run on torch's meta device, where tensors have shapes but no
values. All blocks of a transformer are alike, so the rest is arithmetic.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from teacher.any_length import AnyLengthTransformer
from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.factory import AUDIOSET_CLASSES
from teacher.front_ends import FrontEndConfig, build_front_end
from teacher.registry import ModelCard


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """What tagging one clip costs."""

    parameters: int
    """Trainable numbers, the classifier for AudioSet's classes included."""

    flops: int
    """Floating-point operations of matrix products and convolutions, two for each multiply-accumulate. Additions of
    biases, normalisations, activations and the front end are not counted."""


def count_complexity(card: ModelCard) -> Complexity:
    """Count what tagging a clip of `card.input_seconds` costs."""
    shape = _features_shape(card.front_end, card.input_seconds)
    one, two = (_count(card.network, replace(card.config, depth=depth), shape) for depth in (1, 2))
    more = card.config.depth - 1
    return Complexity(
        parameters=one.parameters + more * (two.parameters - one.parameters),
        flops=one.flops + more * (two.flops - one.flops),
    )


@cache
def _features_shape(config: FrontEndConfig, seconds: float) -> torch.Size:
    """Returns the shape of one clip's features: (1, mels, frames) or AST's (1, frames, mels)."""
    front_end = build_front_end(config).eval()
    return front_end(torch.zeros(1, round(seconds * config.sample_rate_hz))).shape


@cache
def _count(network: type[AudioTransformer], config: TransformerConfig, shape: torch.Size) -> Complexity:
    with torch.device("meta"):
        model = network(config, AUDIOSET_CLASSES).eval()
        features = torch.empty(shape)
    most = model.max_frames if isinstance(model, AnyLengthTransformer) else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pieces = [features] if most is None else features.split(most, dim=-1)
        sequence = torch.cat([model.forward_features(piece) for piece in pieces], dim=1)  # (1, tokens, embed_dim)
        model.head(model.pool(sequence))  # `forward_head` sets up autocast, unknown on "meta"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters=parameters, flops=counter.get_total_flops())
