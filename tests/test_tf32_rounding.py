"""TF32 on a processor: `benchmarks.precision` imitates it where there is no GPU."""

from typing import Any

import torch
from torch import nn

import teacher
from benchmarks.precision import Tf32Products, to_tf32


def test_to_tf32_keeps_ten_bits_and_rounds_halves_to_even() -> None:
    unit = 2.0**-10  # the last bit of 1 to 2
    values = torch.tensor([1 + unit, 1 + 0.5 * unit, 1 + 1.5 * unit, -1 - 0.75 * unit, 2 - 0.25 * unit, 0.0])
    assert to_tf32(values).tolist() == [1 + unit, 1.0, 1 + 2 * unit, -1 - unit, 2.0, 0.0]


def test_all_that_a_network_multiplies_is_rounded_but_for_its_front_end() -> None:
    network = teacher.create_model("passt_tiny").eval()
    waveforms = 0.1 * torch.randn(2, 320_000, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    network.front_end.register_forward_hook(lambda _, __, features: seen.append(features))
    with torch.no_grad():
        exact = network(network.front_end(waveforms))
    with torch.no_grad(), Tf32Products(network):
        rounded = network(network.front_end(waveforms))
    assert torch.equal(*seen)
    deviation = (rounded - exact).abs().max().item()
    assert 1e-6 * exact.abs().max().item() < deviation < 1e-2 * exact.abs().max().item()
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert weights
    assert all(torch.equal(weight, to_tf32(weight)) for weight in weights)
