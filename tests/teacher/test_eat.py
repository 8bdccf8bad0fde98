import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import teacher
from teacher.eat import sine_encodings
from teacher.state_dicts import read_checkpoint

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def released(classes: int = 5) -> dict[str, Tensor]:
    """A small EAT's weights as fairseq's files name them, with two minutes of encodings."""
    torch.manual_seed(0)
    ours = teacher.create_model("eat_base", num_classes=classes, **SMALL).state_dict()
    image = "model.modality_encoders.IMAGE."
    names = {
        "cls_token": f"{image}extra_tokens",
        "pos_embed": f"{image}fixed_positional_encoder.positions",
        "patch_embed.": f"{image}local_encoder.",
        "input_norm.": f"{image}context_encoder.norm.",
        "blocks.": "model.blocks.",
        "head.0.": "fc_norm.",
        "head.1.": "head.",
    }
    theirs = {}
    for key, value in ours.items():
        begin = next(begin for begin in names if key.startswith(begin))
        theirs[names[begin] + key.removeprefix(begin)] = value
    theirs[names["pos_embed"]] = sine_encodings(768, 8, 32)[None]
    return theirs


def assert_same(first: teacher.AudioTransformer, second: teacher.AudioTransformer) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_fairseqs_file_loads_with_its_settings_and_its_longer_encodings(tmp_path: Path) -> None:
    state = {"args": None, "cfg": {"model": {"_name": "mae"}}, "model": released(), "extra_state": {"epoch": 3}}
    torch.save(state, tmp_path / "checkpoint_last.pt")
    torch.manual_seed(0)
    fresh = teacher.create_model("eat_base", num_classes=5, **SMALL)
    assert_same(teacher.create_model("eat_base", tmp_path / "checkpoint_last.pt", **SMALL), fresh)


def test_the_hubs_file_holds_the_same_under_other_names(tmp_path: Path) -> None:
    names = {"context_encoder.norm": "pre_norm", "model.modality_encoders.IMAGE.": "model."}
    theirs = {}
    for key, value in released().items():
        for old, new in names.items():
            key = key.replace(old, new)
        theirs[key if key.startswith("model.") else f"model.{key}"] = value.contiguous()
    assert "model.pre_norm.weight" in theirs
    assert "model.head.weight" in theirs
    save_file(theirs, tmp_path / "model.safetensors")
    assert_same(teacher.create_model("eat_base", tmp_path, **SMALL), teacher.create_model("sslam", released(), **SMALL))


def test_a_file_for_the_other_size_is_recognised() -> None:
    with torch.device("meta"):
        card = teacher.model_card("eat_large")
        large = card.network(card.config, 527).state_dict()
    weights = {key: torch.zeros(()).expand(value.shape) for key, value in large.items()}
    with pytest.raises(ValueError, match=r"does not fit eat_base_epoch30_ap489.*looks like eat_large_epoch20_ap495"):
        teacher.create_model("eat_base", weights)


def test_hostile_settings_beside_the_weights_are_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"cfg": Runs(), "model": released()}, tmp_path / "checkpoint_last.pt")
    with pytest.raises(ValueError, match="would run code when loaded"):
        read_checkpoint(tmp_path / "checkpoint_last.pt")
    assert not (tmp_path / "ran").exists()


def test_fresh_encodings_are_the_originals_sines(fill: types.ModuleType) -> None:
    times, bands, dim = 3, 8, 12
    rates = [10000.0 ** -(number / (dim / 4)) for number in range(dim // 4)]
    encodings = sine_encodings(times, bands, dim)
    for place in range(times * bands):
        time, band = divmod(place, bands)
        angles = torch.tensor([[position * rate for rate in rates] for position in (band, time)])
        expected = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()
        torch.testing.assert_close(encodings[place], expected)


def test_features_of_another_length_are_refused(clips: Callable[..., Tensor]) -> None:
    model = teacher.create_model("eat_base", num_classes=5, **SMALL)
    with pytest.raises(ValueError, match=r"eat_base_epoch30_ap489 takes \(batch, 1024 frames, 128 mels\)"):
        model(model.front_end(clips(16000))[:, :500])
    assert model.no_weight_decay() == {"cls_token"}
    model(model.front_end(clips(16000))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_ast_and_eat_share_one_filter_bank(clips: Callable[..., Tensor]) -> None:
    names = ["ast_tiny", "eat_base", "sslam"]
    sizes: list[dict[str, Any]] = [{}, SMALL, SMALL]
    members = [
        teacher.create_model(name, num_classes=3, **size).eval() for name, size in zip(names, sizes, strict=True)
    ]
    waveforms = clips(16000)
    with torch.inference_mode():
        alone = torch.stack([member(member.front_end(waveforms)) for member in members])
    ran = []
    for member in members:
        member.front_end.register_forward_hook(lambda *_: ran.append(1))
    together = teacher.Ensemble(members, [1, 1, 1])({16000: waveforms})
    assert len(ran) == 1
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
