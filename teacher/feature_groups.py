"""Clips of unlike lengths → features in groups that fit one tensor each, and back to one row of logits a clip."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teacher.front_ends import FrontEnd

Features = Tensor | Mapping[str, Tensor]
"""What a front end gives and a network takes; somebody else's may be several tensors by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureGroup:
    """Some clips of a batch, as their features."""

    clips: Tensor
    """(clips,), int64: their places in the batch."""
    features: Features
    """What the member's network takes."""
    frames: Tensor | None = None
    """(clips,): how many of their frames are the clips' own, where the network has to know."""

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return next(iter([self.features] if isinstance(self.features, Tensor) else self.features.values())).device


def extract_features(
    member: nn.Module, waveforms: Tensor, edge_shifts_hz: Tensor | None, lengths: Tensor | None
) -> list[FeatureGroup]:
    """Returns a member's features of a batch, not yet finished; `Ensemble.forward` describes the arguments.

    Our own families take clips of any lengths together. Others get clips of one length at a time; where what comes out
    has one size all the same, as with extractors that pad, it goes through the network together.
    """
    front_end = member.get_submodule("front_end")
    everything = torch.arange(len(waveforms))
    samples = input_seconds(member) * cast("float", member.sample_rate_hz)
    if isinstance(front_end, FrontEnd):
        if lengths is None:
            features = front_end(waveforms[:, : round(samples)], edge_shifts_hz=edge_shifts_hz, finished=False)
            return [FeatureGroup(clips=everything, features=features)]
        features = front_end(waveforms, edge_shifts_hz=edge_shifts_hz, lengths=lengths, finished=False)
        return [FeatureGroup(clips=everything, features=features, frames=front_end.frames(lengths))]
    if lengths is None or math.isfinite(samples):
        if math.isfinite(samples):
            silence = 0 if lengths is None else max(0, round(samples) - waveforms.shape[1])
            waveforms = F.pad(waveforms[:, : round(samples)], (0, silence))
        return [FeatureGroup(clips=everything, features=front_end(waveforms))]
    groups = []
    for length in lengths.unique().tolist():
        clips = everything[lengths == length]
        groups.append(FeatureGroup(clips=clips, features=front_end(waveforms[clips, :length])))
    return _joined(groups)


def _joined(groups: list[FeatureGroup]) -> list[FeatureGroup]:
    """Join groups whose features have one size."""
    alike: dict[object, list[FeatureGroup]] = {}
    for group in groups:
        its = group.features
        sizes = its.shape[1:] if isinstance(its, Tensor) else tuple((key, one.shape[1:]) for key, one in its.items())
        alike.setdefault(sizes, []).append(group)
    return [
        FeatureGroup(clips=torch.cat([one.clips for one in some]), features=_cat([one.features for one in some]))
        for some in alike.values()
    ]


def _cat(features: list[Features]) -> Features:
    first = features[0]
    if isinstance(first, Tensor):
        return torch.cat(cast("list[Tensor]", features))
    return {name: torch.cat([cast("Mapping[str, Tensor]", one)[name] for one in features]) for name in first}


def logits_of_groups(groups: list[FeatureGroup], network: Callable[[FeatureGroup], Tensor]) -> Tensor:
    """Returns the logits of all clips, (batch, classes), in the batch's order.

    Args:
        groups: from `extract_features`.
        network: a group → (clips, classes).
    """
    order = torch.cat([group.clips for group in groups])
    logits = torch.cat([network(group) for group in groups])
    return logits if len(groups) == 1 and (order.diff() == 1).all() else logits[torch.argsort(order)]


def input_seconds(member: nn.Module) -> float:
    """Returns how much of a clip a member is given, at most; infinite where it takes clips whole."""
    return cast("float", member.input_seconds)


def clip_seconds(member: nn.Module) -> float:
    """Returns how much of a clip of its own length a member can make use of."""
    front_end = member.get_submodule("front_end")
    return front_end.longest_seconds if isinstance(front_end, FrontEnd) else input_seconds(member)
