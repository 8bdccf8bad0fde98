"""Files of weights are known by what they hold, and read without running anything from them."""

import argparse
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import student.weight_files
import teacher.weight_files
from student.state_dicts import read_checkpoint
from student.weight_files import read_weights

TENSORS = {"features.0.0.weight": torch.arange(3.0)}


def test_both_packages_read_files_in_the_same_way() -> None:
    one, other = Path(student.weight_files.__file__), Path(teacher.weight_files.__file__)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors", "a"])
def test_the_name_says_nothing(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name, metadata={"made": "here"})
    content, metadata = read_weights(tmp_path / name)
    assert (str(content), metadata) == (str(TENSORS), {"made": "here"})
    torch.save(TENSORS, tmp_path / name)
    assert str(read_weights(tmp_path / name)[0]) == str(TENSORS)
    assert str(read_checkpoint(tmp_path / name)) == str(TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        np.float64(0.4),
        np.float32(0.4),
        np.int64(7),
        np.bool_(True),
        np.zeros((2, 3), np.float16),
        np.array(["Speech", "Music"]),
        argparse.Namespace(lr=1e-3, folds=[1, 2]),
        {"best": np.float64(0.4), "epochs": [np.int32(3)]},
    ],
)
def test_plain_values_beside_a_state_dict_are_read(tmp_path: Path, beside: object, zipped: bool) -> None:
    path = tmp_path / "run.pt"
    torch.save({"state_dict": TENSORS, "beside": beside}, path, _use_new_zipfile_serialization=zipped)
    content, _ = read_weights(path)
    assert isinstance(content, dict)
    assert str(content["beside"]) == str(beside)
    assert str(read_checkpoint(path)) == str(TENSORS)


def test_numbers_of_numpy_before_version_2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"state_dict": TENSORS, "best": np.float64(0.4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert str(read_checkpoint(path)) == str(TENSORS)


@pytest.mark.parametrize(
    ("beside", "name"), [(print, "builtins.print"), (Path("/x"), "pathlib."), (np.array([{}], object), "")]
)
def test_what_is_more_than_a_value_is_refused_with_its_name_and_a_remedy_that_there_is(
    tmp_path: Path, beside: object, name: str
) -> None:
    torch.save({"state_dict": TENSORS, "beside": beside}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="holds more than tensors") as raised:
        read_weights(tmp_path / "run.pt")
    assert name in str(raised.value)
    assert "torch.save(model.state_dict(), FILE)" in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert "allowlist" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"<html>no weights</html>", b"\x10\0\0\0\0\0\0\0{", b"PK\3\4"])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no whole|is damaged"):
        read_weights(tmp_path / "a.safetensors")


@pytest.fixture
def settings_class(monkeypatch: pytest.MonkeyPatch):
    """Give a class of a package that is not installed where the file is read."""

    def make(module: str, name: str, kind: type = object) -> Any:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            package = ".".join(parts[:count])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made = type(name, (kind,), {"__module__": module})
        setattr(sys.modules[module], name, made)
        return made

    return make


def settings_as_omegaconf_writes_them(settings_class) -> object:
    config = settings_class("omegaconf.dictconfig", "DictConfig")()
    metadata = settings_class("omegaconf.base", "ContainerMetadata")()
    metadata.__dict__ |= {"ref_type": Any, "object_type": dict, "key_type": str, "element_type": Any}
    config.__dict__ |= {"_metadata": metadata, "_content": {"lr": 0.1}}
    return config


def settings_as_fairseq_writes_them(settings_class) -> object:
    return {"cfg": settings_class("fairseq.dataclass.configs", "FairseqConfig")(), "args": argparse.Namespace(lr=1)}


def settings_as_lightning_writes_them(settings_class) -> object:
    hyper = settings_class("pytorch_lightning.utilities.parsing", "AttributeDict", dict)(lr=0.1)
    return {"hyper_parameters": hyper, "callbacks": {settings_class("lightning.pytorch", "Checkpoint"): {"best": 0.4}}}


every_settings = pytest.mark.parametrize(
    "write", [settings_as_omegaconf_writes_them, settings_as_fairseq_writes_them, settings_as_lightning_writes_them]
)


@every_settings
def test_settings_of_training_programs_are_skipped_and_their_packages_not_imported(
    tmp_path: Path, write, settings_class, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": TENSORS, "cfg": write(settings_class)}, tmp_path / "run.pt")
    for name in [name for name in sys.modules if name.startswith(student.weight_files.SETTINGS_OF)]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error from here on
    content, _ = read_weights(tmp_path / "run.pt")
    assert isinstance(content, dict)
    assert str(content["model"]) == str(TENSORS)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@every_settings
def test_a_hostile_object_among_settings_is_refused_by_name_and_not_run(tmp_path: Path, write, settings_class) -> None:
    content = {"model": TENSORS, "cfg": write(settings_class), "extra_state": Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"would run code when loaded \((builtins\.getattr|pathlib\.)"):
        read_weights(tmp_path / "run.pt")
    assert not (tmp_path / "ran").exists()


def test_what_hides_behind_a_name_of_settings_is_not_run(tmp_path: Path, settings_class) -> None:
    run, ran = settings_class("omegaconf", "run"), []

    class Runs:
        def __reduce__(self) -> tuple:
            return run, ("argument",)

    torch.save({"model": TENSORS, "cfg": Runs()}, tmp_path / "run.pt")
    sys.modules["omegaconf"].__dict__["run"] = ran.append
    content, _ = read_weights(tmp_path / "run.pt")
    assert isinstance(content, dict)
    assert isinstance(content["cfg"], student.weight_files.Skipped)
    assert not ran


def archive(path: Path, **members: object) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            file = path.with_suffix(".part")
            torch.save(content, file)
            packed.write(file, f"m2d_vit_base/{name}.pth")
        packed.writestr("m2d_vit_base/README.md", "weights")
    return path


def test_a_release_in_a_zip_archive_is_read_and_its_code_is_not_run(tmp_path: Path) -> None:
    content, _ = read_weights(archive(tmp_path / "released.zip", weights=TENSORS))
    assert str(content) == str(TENSORS)
    with pytest.raises(ValueError, match="would run code when loaded"):
        read_weights(archive(tmp_path / "hostile.zip", weights={"model": TENSORS, "args": Bomb(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="an archive with 2 files of weights; unpack it"):
        read_weights(archive(tmp_path / "two.zip", one=TENSORS, other=TENSORS))
