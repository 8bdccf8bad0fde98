import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import teacher
from teacher.m2d import M2D
from teacher.state_dicts import read_checkpoint

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def small(**settings: Any) -> M2D:
    torch.manual_seed(0)
    model = teacher.create_model("m2d", num_classes=5, **SMALL, **settings).eval()
    assert isinstance(model, M2D)
    return model


def released(model: M2D) -> dict[str, Tensor]:
    """A model's weights under the names that M2D's evaluation package gives a fine-tuned network."""
    names = {"head.0.": "module.head.norm.", "head.1.": "module.head.mlp.mlp.0."}
    theirs = {}
    for key, value in model.state_dict().items():
        begin = key[:7]
        theirs[names[begin] + key[7:] if begin in names else f"module.ar.runtime.backbone.{key}"] = value
    return theirs | {"module.ar.runtime.to_spec.mel_basis": torch.zeros(80, 201)}


def assert_same(loaded: teacher.AudioTransformer, model: M2D) -> None:
    ours = model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.state_dict().items())


def test_a_release_loads_out_of_its_archive(tmp_path: Path) -> None:
    model, folder = small(), "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly"
    model.norm_stats.copy_(torch.tensor([-6.5, 4.1]))
    torch.save(released(model), tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
        archive.write(tmp_path / "weights.pth", f"{folder}/weights_ep69it3124-0.48494.pth")
    loaded = teacher.create_model("m2d_as_base_p16_ap485", tmp_path / f"{folder}.zip", **SMALL)
    assert_same(loaded, model)


def test_a_release_of_2022_gets_the_statistics_that_it_does_not_hold() -> None:
    model = small()
    weights = {key: value for key, value in released(model).items() if not key.endswith("norm_stats")}
    loaded = teacher.create_model("m2d_base_p16_ap479", weights, **SMALL)
    assert isinstance(loaded, M2D)
    assert loaded.norm_stats.tolist() == pytest.approx([-7.1, 4.2])
    assert_same(loaded, model)


def test_the_portable_classs_and_our_own_names_load_too() -> None:
    model = small()
    portable = {
        key.replace("head.0.", "head_norm.").replace("head.1.", "head.")
        if key.startswith("head.")
        else f"backbone.{key}": value
        for key, value in model.state_dict().items()
    }
    assert_same(teacher.create_model("m2d", portable, **SMALL), model)
    assert_same(teacher.create_model("m2d", dict(model.state_dict()), **SMALL), model)


def test_hostile_arguments_beside_the_weights_are_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"args": Runs(), "model": released(small())}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="would run code when loaded"):
        read_checkpoint(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_training_normalises_the_pooled_vector_by_the_batch(clips: Callable[..., Tensor]) -> None:
    model = small().train()
    features = model.front_end(clips(16000, 1.0))
    model(features).square().sum().backward()
    learnt = [key for key, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()]
    assert learnt == [key for key, _ in model.named_parameters()]
    assert model.state_dict()["head.0.running_mean"].any()
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}


@pytest.mark.parametrize(("frames", "used"), [(1, 16), (16, 16), (17, 32), (993, 992), (1001, 992), (1002, 1017)])
def test_a_last_patch_is_filled_up_and_what_is_no_patch_of_a_piece_is_left(frames: int, used: int) -> None:
    assert small().used_frames(frames) == used


def test_a_step_of_one_clip_trains_all_the_same(clips: Callable[..., Tensor]) -> None:
    model = small().train()
    features = model.front_end(clips(16000, 1.0))[:1]
    torch.testing.assert_close(model(features), model.eval()(features))
