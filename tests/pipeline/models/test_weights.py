import hashlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from file_server import FileServer
from safetensors.numpy import save_file

from pipeline.errors import CheckpointError
from pipeline.models.weights import load_checkpoint_metadata, local_file, sha256_of_file

METADATA = {
    "stage": "student",
    "model": "mn04",
    "kwargs": '{"width_mult": 0.4}',
    "classes": "527",
    "vocabulary_sha256": "ab" * 32,
}


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    save_file({"weight": np.zeros(3, np.float32)}, path, metadata)
    return path


@pytest.fixture
def bucket() -> Iterator[str]:
    name = f"memory://{uuid4().hex}"
    yield name
    fsspec.filesystem("memory").rm(name.removeprefix("memory://"), recursive=True)


def test_a_checkpoint_says_what_builds_it(tmp_path: Path) -> None:
    found = load_checkpoint_metadata(write(tmp_path / "best.safetensors", METADATA))
    assert found is not None
    assert (found.stage, found.model, found.kwargs, found.classes) == ("student", "mn04", {"width_mult": 0.4}, 527)
    assert found.vocabulary_sha256 == "ab" * 32


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_has_no_metadata_of_ours(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    assert load_checkpoint_metadata(write(tmp_path / "model.safetensors", metadata)) is None


def test_a_foreign_torch_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "mn10_as_mAP_471.pt"
    path.write_bytes(b"whatever")
    assert load_checkpoint_metadata(path) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"classes": "many"}, "classes"), ({"stage": "pupil"}, "stage"), ({"kwargs": "{"}, "kwargs")],
)
def test_broken_metadata_is_named(tmp_path: Path, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_metadata(write(tmp_path / "best.safetensors", METADATA | wrong))


def test_a_cut_off_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = write(tmp_path / "best.safetensors", METADATA)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"best\.safetensors: not a whole"):
        load_checkpoint_metadata(path)


def test_a_local_file_is_used_where_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "best.safetensors", METADATA)
    with local_file(path) as found:
        assert found == path
    assert path.exists()


def test_a_remote_file_lies_here_for_as_long_as_it_is_needed(bucket: str) -> None:
    with fsspec.open(f"{bucket}/best.safetensors", "wb") as stream:
        stream.write(b"weights")  # pyright: ignore[reportAttributeAccessIssue]
    with local_file(f"{bucket}/best.safetensors") as found:
        assert found.name == "best.safetensors"
        assert found.read_bytes() == b"weights"
        assert sha256_of_file(found) == hashlib.sha256(b"weights").hexdigest()
    assert not found.exists()


@pytest.mark.parametrize("remote", [False, True])
def test_an_absent_file_is_a_checkpoint_error(tmp_path: Path, remote: bool) -> None:
    location = f"memory://{uuid4().hex}/none.pt" if remote else str(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt: .*no such file"), local_file(location):
        pass


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder, not a file"), local_file(tmp_path):
        pass


@pytest.mark.parametrize("names", [["best.safetensors", "last.safetensors", "config.toml"], ["last.safetensors"]])
@pytest.mark.parametrize("remote", [False, True])
def test_a_runs_folder_stands_for_its_best_weights(
    tmp_path: Path, file_server: FileServer, remote: bool, names: list[str]
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
        file_server.files[f"/runs/mn10/{name}"] = name.encode()
    with local_file(file_server.url("/runs/mn10") if remote else tmp_path) as found:
        assert found.read_bytes() == names[0].encode()
