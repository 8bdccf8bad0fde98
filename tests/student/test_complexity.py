"""Parameters, multiply-accumulates and peak memory are upstream's figures."""

import json

import pytest
import torch

from student.complexity import count_complexity
from student.registry import create_model, model_card

WIDTHS = ["mn01", "mn02", "mn04", "mn05", "mn06", "mn08", "mn10", "mn12", "mn14", "mn16", "mn20", "mn30", "mn40"]
VARIANTS = ["fc", "fc_s2221", "fc_s2211", "hop_5", "hop_15", "hop_20", "hop_25", "mels_40", "mels_64", "mels_256"]
DYNAMIC = ["dymn04", "dymn10", "dymn20"]


@pytest.mark.parametrize("golden", [*WIDTHS, *(f"mn10_{variant}" for variant in VARIANTS), *DYNAMIC])
def test_equals_upstreams_count(golden_dir, golden) -> None:
    expected = json.loads((golden_dir / "complexity.json").read_text())["models"][golden]
    with torch.device("meta"):
        cost = count_complexity(create_model(golden.replace("mn10_", "mn10_as_")))
    kilobytes = [held and held * 2 / 1000 for held in (cost.peak_activations, cost.peak_activations_sliced)]
    assert cost.parameters == expected["parameters"]
    assert cost.macs == expected.get("macs", expected.get("macs_total"))
    assert kilobytes == [
        expected.get("peak_memory_kB_fp16"),
        expected.get("peak_memory_kB_fp16_memory_efficient"),
    ]


def test_counting_leaves_the_model_alone() -> None:
    model = create_model("mn01").train()
    count_complexity(model, seconds=1.0)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(module._forward_hooks for module in model.modules())


def test_a_longer_sound_costs_more() -> None:
    model = create_model("mn01")
    assert count_complexity(model, seconds=20).macs > 1.9 * count_complexity(model).macs


def test_static_dynamic_models_are_counted_too() -> None:
    static = count_complexity(create_model("dymn04", no_dyconv=True))
    assert static.macs < count_complexity(create_model("dymn04")).macs
    assert static.peak_activations is None
    assert model_card("dymn04").paper.endswith("2310.15648")
