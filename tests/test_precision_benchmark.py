"""`benchmarks.precision` hears clips as stage 1 does, and imitates TF32 where there is no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import teacher
from benchmarks.precision import Tf32Products, build, logits_of, read_waveforms, to_tf32
from pipeline.dataset.manifest import read_manifest


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


def test_what_follows_a_clip_in_its_batch_is_not_heard(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    manifest = read_manifest(make_dataset(tmp_path, clips=2))
    waveforms, lengths = read_waveforms(manifest, np.arange(2), build("ast_tiny"))
    assert (waveforms.shape, lengths.tolist()) == ((2, 8000), [8000, 8000])
    alone = logits_of("ast_tiny", waveforms, lengths, "float32", batch=1, device="cpu")
    longer = torch.tensor([8000, 16000])
    beside = logits_of("ast_tiny", F.pad(waveforms, (0, 8000)), longer, "float32", batch=2, device="cpu")
    assert torch.allclose(beside[0], alone[0], atol=1e-4)
    assert not torch.allclose(beside[1], alone[1], atol=1e-2)
