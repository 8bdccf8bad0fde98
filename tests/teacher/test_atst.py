from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import teacher
from teacher.atst import ATSTFrame
from teacher.state_dicts import read_checkpoint

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
every_kind = pytest.mark.parametrize("name", ["atst_frame_base", "atst_clip_base"])


def small(name: str) -> ATSTFrame:
    torch.manual_seed(0)
    model = teacher.create_model(name, num_classes=5, **SMALL).eval()
    assert isinstance(model, ATSTFrame)
    return model


def as_lightning_writes(model: ATSTFrame, norm: str) -> dict[str, Any]:
    """A fine-tuned model's checkpoint under its authors' names."""
    names = {"head.0.": "head.norm.", "head.1.": "head.linear.", "norm.": f"encoder.encoder.{norm}."}
    names |= {"patch_embed.proj.": "encoder.encoder.patch_embed.patch_embed."}
    theirs = {}
    for key, value in model.state_dict().items():
        begin = next((begin for begin in names if key.startswith(begin)), "")
        theirs[names.get(begin, "encoder.encoder.") + key.removeprefix(begin)] = value
    theirs["encoder.encoder.patch_embed.patch_embed.weight"] = model.patch_embed.proj.weight.detach().reshape(32, 256)
    theirs["encoder.encoder.mask_embed"] = torch.zeros(1, 1, 32)
    return {"state_dict": theirs, "hyper_parameters": {"learning_rate": 0.5}, "epoch": 9}


@every_kind
def test_a_fine_tuned_checkpoint_loads(name: str, tmp_path: Path) -> None:
    model = small(name)
    content = as_lightning_writes(model, "norm_frame" if name == "atst_frame_base" else "norm")
    torch.save(content, tmp_path / "last.ckpt")
    loaded, ours = teacher.create_model(name, tmp_path / "last.ckpt", **SMALL), model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.state_dict().items())


def test_hostile_hyper_parameters_are_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    content = as_lightning_writes(small("atst_frame_base"), "norm_frame")
    torch.save(content | {"hyper_parameters": Runs()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="would run code when loaded"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


@every_kind
def test_of_a_long_clip_the_middle_twelve_seconds_are_heard(name: str, clips: Callable[..., Tensor]) -> None:
    model = small(name)
    [clip, _] = clips(16000, 20.0)
    noisy = clip.clone()
    noisy[: 4 * 16000] = 0.5
    noisy[16 * 16000 :] = -0.5
    lengths = torch.tensor([len(clip)])
    with torch.inference_mode():
        first, second = (model.front_end(one[None], lengths=lengths) for one in (clip, noisy))
        assert first.shape[2] == model.front_end.frames(lengths) == 1201
        assert torch.equal(first, second)


@every_kind
def test_a_short_rest_of_a_clip_does_not_count(name: str) -> None:
    model = small(name)
    piece = model.piece_frames
    assert model.used_frames(piece + piece // 2) == piece
    assert model.used_frames(piece + piece // 2 + 4) > piece


@every_kind
def test_training_normalises_the_pooled_vector_by_the_batch(name: str, clips: Callable[..., Tensor]) -> None:
    model = small(name).train()
    model(model.front_end(clips(16000, 1.0))).square().sum().backward()
    assert model.state_dict()["head.0.running_mean"].any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.reset_classifier(3)
    assert model.eval()(model.front_end(clips(16000, 1.0))).shape == (2, 3)
