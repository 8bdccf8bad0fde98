import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import teacher
from teacher.state_dicts import read_checkpoint, to_our_names

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def passt() -> dict[str, Tensor]:
    """A small PaSST's weights as upstream spells them."""
    torch.manual_seed(0)
    weights = dict(teacher.create_model("passt_s", num_classes=5, **SMALL).state_dict())
    return weights | {"head_dist.weight": torch.zeros(5, 32), "head_dist.bias": torch.zeros(5)}


def assert_loads(checkpoint: Path | dict[str, Tensor], expected: dict[str, Tensor], name: str = "passt_s") -> None:
    state = teacher.create_model(name, checkpoint, **SMALL).state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net.", "module.", "_orig_mod.", "net_swa.", "net._orig_mod."])
def test_passt_loads_behind_any_prefix(passt: dict[str, Tensor], prefix: str) -> None:
    assert_loads({prefix + key: value for key, value in passt.items()}, passt)


def test_averaged_weights_are_preferred(passt: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    last = {f"net.{key}": torch.zeros_like(value) for key, value in passt.items()}
    averaged = {f"net_swa.{key}": value for key, value in passt.items()}
    with caplog.at_level(logging.INFO):
        assert_loads({**last, **averaged, "n_averaged": torch.tensor(3)}, passt)
        assert_loads({**averaged, **last}, passt)
    assert "took the weights under 'net_swa.', left those under ['net.']" in caplog.text


def test_a_lightning_file_loads(passt: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"epoch": 3, "state_dict": {f"net.{key}": value for key, value in passt.items()}, "callbacks": {}}
    torch.save(content, tmp_path / "last.ckpt")
    assert_loads(tmp_path / "last.ckpt", passt)


def test_every_official_ast_key_and_its_hugging_face_name_become_ours(golden_dir: Path) -> None:
    mapping = json.loads((golden_dir / "ast_key_map.json").read_text())["mapping"]
    ours = set(teacher.create_model("ast_base", depth=12, embed_dim=12).state_dict())
    assert set(to_our_names({key: torch.zeros(1) for key in mapping}, "official")) == ours
    theirs = {name for names in mapping.values() if names for name in ([names] if isinstance(names, str) else names)}
    assert set(to_our_names({key: torch.zeros(1) for key in theirs}, "Hugging Face")) == ours


def test_separate_queries_keys_and_values_are_laid_on_top_of_each_other() -> None:
    prefix = "audio_spectrogram_transformer.encoder.layer.0.attention.attention."
    parts = {f"{prefix}{name}.bias": torch.full((2,), float(i)) for i, name in enumerate(("value", "key", "query"))}
    anchor = {"audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight": torch.zeros(1)}
    fused = to_our_names({**parts, **anchor}, "Hugging Face")["blocks.0.attn.qkv.bias"]
    assert fused.tolist() == [2, 2, 1, 1, 0, 0]


def test_ced_loads_in_hugging_faces_spelling_too() -> None:
    torch.manual_seed(0)
    expected = teacher.create_model("ced_tiny", num_classes=5, **SMALL).state_dict()
    theirs = {
        key.replace("head.", "outputlayer.") if key.startswith("head.") else f"encoder.{key}": value
        for key, value in expected.items()
    }
    assert_loads(theirs, expected, "ced_tiny")


def test_a_folder_of_hugging_faces_loads(passt: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(passt, tmp_path / "model.safetensors")
    assert_loads(tmp_path, passt)


def test_float16_files_of_our_own_come_back_with_their_settings(tmp_path: Path, clips: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = teacher.create_model("passt_tiny", num_classes=7, depth=1, s_patchout_t=9)
    metadata = {"model": "passt_tiny", "kwargs": json.dumps({"depth": 1, "s_patchout_t": 9}), "classes": "7"}
    halves = {key: value.half() for key, value in model.state_dict().items()}
    save_file(halves, tmp_path / "tiny.safetensors", metadata)
    loaded = teacher.create_model("passt_tiny", tmp_path / "tiny.safetensors")
    assert (loaded.num_classes, loaded.config.s_patchout_t) == (7, 9)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    features = model.eval().front_end(clips(32000))
    torch.testing.assert_close(loaded.eval()(features), model(features), rtol=0, atol=1e-3)
    assert teacher.create_model("passt_tiny", tmp_path / "tiny.safetensors", s_patchout_t=2).config.s_patchout_t == 2


def test_training_does_not_change_the_given_mapping(passt: dict[str, Tensor]) -> None:
    model = teacher.create_model("passt_s", passt, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    assert not (passt["head.1.weight"] == 9).any()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": _Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(ValueError, match=rf"{name}: is damaged, or holds more than tensors"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(passt: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(passt, whole)
    else:
        save_file(passt, whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut{suffix}: is no whole"):
        read_checkpoint(cut)


def test_what_holds_no_transformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the given mapping: no key ends in patch_embed.*it has conv\.weight"):
        read_checkpoint({"conv.weight": torch.zeros(1)})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list; expected a mapping"):
        read_checkpoint(tmp_path / "list.pt")


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        read_checkpoint(tmp_path)
