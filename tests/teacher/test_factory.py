import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import teacher
from teacher.registry import ALIASES


def weights_of(name: str, classes: int = 5) -> dict[str, Tensor]:
    """Zeros in the shapes of a model."""
    card = teacher.model_card(name)
    with torch.device("meta"):
        network = card.network(card.config, classes)
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny", "ced_tiny"])
def test_timm_builds_the_same_models_by_the_same_names(name: str) -> None:
    torch.manual_seed(0)
    ours = teacher.create_model(name, num_classes=4)
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=4)
    assert isinstance(theirs, type(ours))
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_timm_knows_every_name_and_alias() -> None:
    assert all(timm.is_model(name) for name in (*teacher.model_names(), *ALIASES))


def test_a_model_of_our_own_has_no_released_weights() -> None:
    with pytest.raises(ValueError, match="no weights were released for passt_tiny"):
        teacher.create_model("passt_tiny", pretrained=True)


def test_timm_lists_what_was_released_with_its_licence() -> None:
    assert {"passt_s", "ast_base", "ced_tiny"} <= set(timm.list_models(pretrained=True))
    assert "passt_tiny" not in timm.list_models(pretrained=True)
    cfg = timm.get_pretrained_cfg("ced_tiny")
    assert cfg is not None
    assert (cfg.license, cfg.num_classes, cfg.classifier) == ("apache-2.0", 527, "head.1")


def test_timm_takes_a_file_of_the_users_own(tmp_path: Path) -> None:
    save_file({key: value.clone() for key, value in weights_of("ced_tiny").items()}, tmp_path / "own.safetensors")
    model = timm.create_model(
        "ced_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "own.safetensors")}
    )
    assert not any(value.any() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "written_for", "differs"),
    [
        ("passt_s", "passt_s_p16_s16_128_ap468", r"time_new_pos_embed has shape \(1, 768, 1, 62\)"),
        ("passt_s", "passt_s_swa_p16_s12_128_ap473", r"freq_new_pos_embed has shape \(1, 768, 10, 1\)"),
        ("passt_s_30sec", "passt_s_f128_20sec_p16_s10_ap474_swa", r"needs \(1, 768, 1, 300\)"),
        ("passt_s", "passt_l_kd_p16_128_ap47", r"60 keys differ: blocks\.7\.norm1\.weight is missing"),
        ("ast_base_p16_s10", "ast_base_p16_s16_ap442", r"pos_embed has shape \(1, 514, 768\).* needs \(1, 1214, 768\)"),
        ("ast_base", "passt_s_swa_p16_128_ap476", r"pos_embed is missing; new_pos_embed is unknown to ast_base"),
        ("ced_small", "ced_mini", r"has shape"),
    ],
)
def test_a_checkpoint_for_another_model_is_refused_and_recognised(name: str, written_for: str, differs: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)does not fit .*{differs}.*looks like .*{written_for}"):
        teacher.create_model(name, weights_of(written_for))


def test_a_stride_set_by_hand_needs_its_own_encodings() -> None:
    with pytest.raises(ValueError, match=r"pos_embed has shape .*It looks like passt_s_swa_p16_128_ap476"):
        teacher.create_model("passt_s", weights_of("passt_s"), stride=16)


def test_a_checkpoint_that_fits_nothing_says_so() -> None:
    weights = {**weights_of("ced_tiny"), "surprise": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 keys differ: surprise is unknown to ced_tiny\. It fits no registered"):
        teacher.create_model("ced_tiny", weights)


def test_our_own_file_for_another_model_is_refused_by_its_name(tmp_path: Path) -> None:
    # The 20 s model and the one with the shorter hop have the same shapes, but not the same front end.
    hop160 = "passt_s_swa_f128_stfthop160_p16_s10_ap473"
    weights = {key: value.half().clone() for key, value in weights_of(hop160).items()}
    save_file(weights, tmp_path / "hop.safetensors", {"model": hop160})
    with pytest.raises(ValueError, match=rf"hop\.safetensors: was written for {hop160}, not for passt_s_f128_20sec"):
        teacher.create_model("passt_s_20sec", tmp_path / "hop.safetensors")


TWINS = ("passt_s_swa_f128_stfthop160_p16_s10_ap473", "passt_s_f128_20sec_p16_s10_ap474_swa")
M2D_AT_32_KHZ = "m2d_as_base_p16_32khz_ap480"
M2D_AT_16_KHZ = ("m2d_clap_base_p16_ap485", "m2d_as_base_p16_ap485", "m2d_base_p16_ap479")


def test_only_known_twins_share_shapes_but_not_the_computation() -> None:
    cards = [teacher.model_card(name) for name in teacher.model_names()]
    shapes = {card.name: {key: value.shape for key, value in weights_of(card.name).items()} for card in cards}
    confusable = {
        frozenset((one.name, other.name))
        for one in cards
        for other in cards
        if shapes[one.name] == shapes[other.name]
        and (one.config, one.front_end, one.input_seconds) != (other.config, other.front_end, other.input_seconds)
        and one.weights_url != other.weights_url
        and not one.name.endswith("_hf")
        and not other.name.endswith("_hf")  # the same network as ast_base but for epsilons, meant for any AST file
    }
    assert confusable == {frozenset(TWINS), *(frozenset((M2D_AT_32_KHZ, name)) for name in M2D_AT_16_KHZ)}


@pytest.mark.parametrize(("name", "twin"), [TWINS, TWINS[::-1]])
def test_a_released_file_of_its_twin_is_refused_by_its_name(
    name: str, twin: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {key: value.half().clone() for key, value in weights_of(name).items()}
    file = str(teacher.model_card(name).weights_url).rpartition("/")[2]
    torch.save(weights, tmp_path / file)
    with pytest.raises(ValueError, match=rf"was released as {name}, which has the shapes of {twin} but takes other"):
        teacher.create_model(twin, tmp_path / file)
    teacher.create_model(name, tmp_path / file)
    assert not caplog.text
    (tmp_path / file).rename(tmp_path / "mine.pt")
    teacher.create_model(name, tmp_path / "mine.pt")
    assert f"mine.pt fits {name} and {twin} alike" in caplog.text


def test_a_release_under_another_name_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {key: value.half().clone() for key, value in weights_of("passt_s").items()}
    torch.save(weights, tmp_path / "passt-s-kd-ap.486.pt")
    teacher.create_model("passt_s", tmp_path / "passt-s-kd-ap.486.pt")
    assert "was released as passt_s_kd_p16_128_ap486, not as passt_s_swa_p16_128_ap476" in caplog.text


def test_the_number_of_classes_is_the_checkpoints() -> None:
    assert teacher.create_model("ced_tiny", weights_of("ced_tiny", 50)).num_classes == 50
    assert teacher.create_model("ced_tiny").num_classes == 527


def test_another_number_of_classes_starts_the_last_layer_afresh_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = teacher.create_model("ced_tiny", weights_of("ced_tiny", 50), num_classes=3)
    assert "has 50 classes, 3 were asked for: the last layer of ced_tiny starts afresh" in caplog.text
    last = model.get_classifier()
    assert isinstance(last, nn.Linear)
    assert last.weight.shape == (3, 192)
    assert last.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.state_dict()["norm.weight"].any()  # all the rest is the checkpoint's zeros
    assert model(model.front_end(torch.zeros(1, 16000))).shape == (1, 3)


def test_the_checkpoints_number_of_classes_keeps_its_last_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = teacher.create_model("ced_tiny", weights_of("ced_tiny", 3), num_classes=3)
    last = model.get_classifier()
    assert isinstance(last, nn.Linear)
    assert not last.weight.any()
    assert not caplog.text


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(ValueError, match=r"no teacher is called 'past_tiny'; did you mean passt_tiny"):
        teacher.create_model("past_tiny")


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"passt_tiny has no setting patchout; it has .*s_patchout_t"):
        teacher.create_model("passt_tiny", patchout=3)
