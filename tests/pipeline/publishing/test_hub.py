"""Publishing to the Hub, against a look-alike on this machine; and nothing leaves it unless a target says so."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve_hub

import student
from pipeline import cli
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.publishing.hub import Repository, repository_of
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that the client in this process knows, with a token for it."""
    import huggingface_hub.constants as constants

    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "of-a-test")
        yield hub


@pytest.fixture
def weights(tmp_path: Path) -> str:
    from pipeline.dataset.vocabulary import LabelClass, Vocabulary

    vocabulary = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(5)))
    model = student.create_model("mn01", num_classes=5, **COARSE)
    metadata = {"stage": "student", "model": "mn01", "kwargs": COARSE, "classes": 5}
    metadata |= {"vocabulary_sha256": vocabulary.sha256, "vocabulary": vocabulary.to_csv_bytes().decode()}
    save_weights(tmp_path / "tagger.safetensors", model.state_dict(), metadata)
    return str(tmp_path / "tagger.safetensors")


def test_a_model_comes_back_from_the_hub_through_timm_as_it_was(hub: Hub, weights: str, tmp_path: Path) -> None:
    assert cli.run(["publish", weights, "--no-onnx", "--to", "hf://me/tagger"]) == 0
    assert [(one["name"], one["organization"], one["visibility"]) for one in hub.made] == [("tagger", "me", "private")]
    assert hub.files["models/me/tagger/model.safetensors"] == Path(weights).read_bytes()
    assert b"hf-hub:" in hub.files["models/me/tagger/README.md"]
    program = (
        "import sys, timm, torch, student\n"
        "built = timm.create_model('hf-hub:me/tagger', pretrained=True)\n"
        f"own = student.create_model('mn01', {weights!r}, num_classes=5, n_mels=40, hopsize=1600)\n"
        "assert all(torch.equal(one, own.state_dict()[key]) for key, one in built.state_dict().items())\n"
        "print(built.pretrained_cfg['label_names'])\n"
    )
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([f"/m/{index}" for index in range(5)])


def test_a_dataset_goes_up_as_it_is_and_public_where_that_is_said(
    hub: Hub, build_dataset: Callable[..., Manifest], make_noises: Callable
) -> None:
    data = build_dataset("data", make_noises(6, 5))
    assert cli.run(["publish", data.location, "--to", "hf://datasets/me/sounds", "--public"]) == 0
    assert [(one["type"], one["visibility"]) for one in hub.made] == [("dataset", "public")]
    held = {name.removeprefix("datasets/me/sounds/"): content for name, content in hub.files.items()}
    assert held.keys() == {"README.md", "classes.csv", "manifest.parquet", *data.shards}
    for shard in data.shards:
        assert held[shard] == Path(data.location, shard).read_bytes()
    assert not Path(data.location, "README.md").exists()


def test_a_hub_that_refuses_or_is_not_there_ends_in_one_line(
    hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    assert cli.run(["publish", weights, "--no-onnx", "--to", "hf://me/tagger"]) == 1
    assert "hf://me/tagger: the Hub refuses: " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert cli.run(["publish", weights, "--no-onnx", "--to", "hf://me/tagger"]) == 1
    assert "hf://me/tagger: the Hub can't be reached" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_asks_nobody(hub: Hub, weights: str, tmp_path: Path) -> None:
    assert cli.run(["publish", weights, "--no-onnx", "--to", str(tmp_path / "out")]) == 0
    assert hub.asked == []


@pytest.mark.parametrize("target", ["s3://bucket/x", "hf://name", "hf://a/b/c", "hf://datasets/a/b"])
def test_other_addresses_are_no_targets_of_a_model(target: str) -> None:
    with pytest.raises(UsageError, match="--to"):
        repository_of(target, "model")


def test_a_repository_is_named_with_or_without_its_kind() -> None:
    assert repository_of("hf://a/b", "dataset") == repository_of("hf://datasets/a/b/", "dataset")
    assert repository_of("hf://models/a/b", "model") == Repository("a/b", "model")
    assert repository_of("some/folder", "model") is None
