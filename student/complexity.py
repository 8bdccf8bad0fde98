"""What a student costs: parameters, multiply-accumulates, activation memory, counted as EfficientAT counts them.

Nothing is computed: the model, or a copy of it, runs on torch's meta device, where tensors have shapes but no values.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from student.dynamic_layers import DynamicConv
from student.mobilenetv3 import InvertedResidual, MobileNetV3
from student.tagger import Tagger

SLICES = 8
"""Memory-efficient inference computes a block in this many slices of channels (arXiv:1801.04381, Section 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """What tagging one sound costs."""

    parameters: int
    """Trainable numbers."""

    macs: int
    """Multiply-accumulates of convolutions and linear layers, biases included, the front end not."""

    peak_activations: int | None
    """Most numbers held at once, layer by layer; two bytes each in half precision. None for a DyMN."""

    peak_activations_sliced: int | None
    """The same with memory-efficient inference. None where it isn't defined: DyMN, or a block without expansion."""


def count_complexity(model: Tagger, seconds: float | None = None) -> Complexity:
    """Count what tagging a sound costs.

    Args:
        model: any student; it isn't changed.
        seconds: length of the sound; None is the model's `input_seconds`.
    """
    config = model.front_end.config
    samples = round((model.input_seconds if seconds is None else seconds) * config.sample_rate_hz)
    image = torch.empty(1, 1, config.mels, config.frames(samples), device="meta")
    is_mn = isinstance(model, MobileNetV3)
    on_meta = next(model.parameters()).is_meta
    calls = _record_calls(model if on_meta else copy.deepcopy(model).to("meta"), image)
    return Complexity(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(_macs(call) for call in calls),
        peak_activations=_peak(calls) if is_mn else None,
        peak_activations_sliced=_peak_sliced(calls) if is_mn else None,
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """One module's turn in the forward pass."""

    module: nn.Module
    taken: torch.Size
    given: torch.Size


def _record_calls(network: nn.Module, image: Tensor) -> list[_Call]:
    """Run the network and list its modules' turns in the order in which they end."""
    calls: list[_Call] = []

    def record(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            calls.append(_Call(module, inputs[0].shape, output.shape))

    handles = [module.register_forward_hook(record) for module in network.modules()]
    # Normalisations and activations count for nothing and keep shapes, but take most of the time on "meta".
    passed_over: list[nn.Module] = [module for module in network.modules() if isinstance(module, _UNCOUNTED)]
    for module in passed_over:
        module.forward = _unchanged
    network(image)
    for module in passed_over:
        del module.forward
    for handle in handles:
        handle.remove()
    return calls


_UNCOUNTED = nn.BatchNorm2d | nn.ReLU | nn.Hardswish | nn.Dropout


def _unchanged(maps: Tensor) -> Tensor:
    return maps


def _macs(call: _Call) -> int:
    layer = call.module
    if isinstance(layer, nn.Conv2d):
        return call.given[2:].numel() * sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Linear):
        return sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, DynamicConv):  # once through the bank to mix the kernels, then the convolution itself
        return layer.weight.numel() + call.given[2:].numel() * layer.weight[0, 0, 0].numel()
    return 0


def _peak(calls: list[_Call]) -> int:
    """Input and output of each convolution, plus what a residual connection holds back meanwhile."""
    held_back: dict[nn.Module, int] = {}
    for call in calls:
        if isinstance(call.module, InvertedResidual) and call.module.config.is_residual:
            convolutions = [layer for layer in call.module.modules() if isinstance(layer, nn.Conv2d)]
            held_back |= dict.fromkeys(convolutions[1:], call.taken.numel())  # the first reads the block's input itself
    return max(
        call.taken.numel() + call.given.numel() + held_back.get(call.module, 0)
        for call in calls
        if isinstance(call.module, nn.Conv2d)
    )


def _peak_sliced(calls: list[_Call]) -> int | None:
    """The same where a block's expanded channels are computed a slice at a time, which squeeze-excitation forbids."""
    blocks = [(call, call.module) for call in calls if isinstance(call.module, InvertedResidual)]
    first = blocks[0][0]
    in_one_go = calls[0].taken.numel() + first.given.numel()  # the first convolution and the first block
    held = [in_one_go + 2 * first.taken.numel() // SLICES]
    for call, block in blocks[1:]:
        config = block.config
        if config.expanded_channels == config.in_channels:
            return None
        both_ends = call.taken.numel() + call.given.numel()
        if block.squeezes:
            held.append(both_ends + call.given[2:].numel() * config.expanded_channels)
        else:
            mels, frames = call.taken[2:]
            positions = mels * frames + (mels // config.effective_stride) * (frames // config.effective_stride)
            held.append(both_ends + positions * config.expanded_channels // SLICES)
    return max(held)
