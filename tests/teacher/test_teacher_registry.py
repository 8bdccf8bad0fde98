import pytest
import torch

import teacher
from teacher.registry import ALIASES

# Strides, encodings and sizes that the released files hold; classifier and encodings included.
PARAMETERS_M = {"passt_s": 85.75, "passt_l_kd_p16_128_ap47": 50.3, "ast_base": 86.6, "ced_tiny": 5.5, "ced_mini": 9.7}
PARAMETERS_M |= {"ced_small": 21.7, "ced_base": 85.9}
PARAMETERS_M |= {"eat_base": 85.7, "eat_large": 303.1, "beats": 90.7, "m2d": 85.9, "atst_frame_base": 85.8}


def test_aliases_and_names_lead_to_one_card() -> None:
    assert not ALIASES.keys() & set(teacher.model_names())
    for alias, name in ALIASES.items():
        assert teacher.model_card(alias) is teacher.model_card(name)


@pytest.mark.parametrize("name", teacher.model_names())
def test_every_card_says_where_its_model_comes_from(name: str) -> None:
    card = teacher.model_card(name)
    assert card.licence
    assert card.paper.startswith("https://arxiv.org/abs/")
    is_pretrained_alone = name.startswith("atst_")  # fine-tuned weights were not released
    if (not name.endswith("_tiny") or name == "ced_tiny") and not is_pretrained_alone:
        assert card.weights_url or card.weights_page
        assert card.published_map
        assert 0.4 < card.published_map < 0.51


@pytest.mark.parametrize("name", teacher.model_names())
def test_the_encodings_of_every_model_cover_its_input(name: str) -> None:
    card = teacher.model_card(name)
    samples = card.input_seconds * card.front_end.sample_rate_hz
    frames = samples // card.front_end.hop_samples
    assert frames - card.config.patch < card.config.frames // card.config.stride * card.config.stride + 16


@pytest.mark.parametrize(("name", "millions"), PARAMETERS_M.items())
def test_parameters_are_as_published(name: str, millions: float) -> None:
    card = teacher.model_card(name)
    with torch.device("meta"):
        network = card.network(card.config, 527)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_nine_teachers_of_the_published_ensemble_are_there() -> None:
    names = [name for name in teacher.model_names() if name.startswith("passt_s") and "f128" not in name]
    assert len([name for name in names if "kd" not in name]) == 9
