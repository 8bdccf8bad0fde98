"""Parameters and operations of teachers are upstream's figures."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import teacher

NAMES = {
    "passt_s_s10": "passt_s",
    "passt_s_s12": "passt_s_swa_p16_s12_128_ap473",
    "passt_s_s14": "passt_s_p16_s14_128_ap469",
    "passt_s_s16": "passt_s_p16_s16_128_ap468",
    "passt_l_s10": "passt_l_kd_p16_128_ap47",
    "ast_10_10": "ast_base",
    "ast_12_12": "ast_base_p16_s12",
    "ast_16_16": "ast_base_p16_s16",
}


@pytest.mark.parametrize(("golden", "name"), NAMES.items())
def test_equals_upstreams_count(golden_dir: Path, golden: str, name: str) -> None:
    expected = json.loads((golden_dir / "complexity.json").read_text())["models"][golden]
    card = teacher.model_card(name)
    cost = teacher.count_complexity(card)
    assert cost.parameters == expected["parameters_used"]
    # Upstream counts multiply-accumulates, and an addition of a bias as one of them.
    config = card.config
    rows = (config.mels - 16) // config.stride + 1
    frames = 1000 if golden.startswith("passt") else 1024
    patches = rows * ((frames - 16) // config.stride + 1)
    in_a_block = (3 + 1 + 4 + 1) * config.embed_dim
    biases = patches * config.embed_dim + config.depth * (patches + 2) * in_a_block + 527
    assert cost.flops == 2 * (expected["macs"] - biases)


@pytest.mark.parametrize("name", ["ced_tiny", "passt_tiny", "passt_l_kd_p16_128_ap47"])
def test_two_blocks_tell_what_all_of_them_cost(name: str) -> None:
    card = teacher.model_card(name)
    with torch.device("meta"):
        model = card.network(card.config, 527).eval()
        frames = round(card.input_seconds * card.front_end.sample_rate_hz) // card.front_end.hop_samples
        features = torch.empty(1, card.config.mels, frames + (name == "ced_tiny"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_features(features)
    cost = teacher.count_complexity(card)
    head = 2 * card.config.embed_dim * 527
    assert cost.flops == counter.get_total_flops() + head
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_longer_input_costs_more() -> None:
    short, long = (teacher.count_complexity(teacher.model_card(name)) for name in ("passt_s", "passt_s_30sec"))
    assert long.flops > 3 * short.flops
