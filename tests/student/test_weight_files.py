"""Files of weights are known by what they hold, and read without running anything from them."""

import argparse
from pathlib import Path

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
