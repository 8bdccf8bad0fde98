"""A store and a dataset are published as they are, with a card."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_stores import fill_store, stamp_for

from pipeline import cli
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.logits.store import open_store
from pipeline.scoring.report import hash_of_ids


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(12, 5))


def test_a_dataset_is_copied_whole_with_its_card(data: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.run(["publish", data.location, "--to", str(out), "--name", "My *sounds*", "--licence", "CC-BY-4.0"]) == 0
    copied = read_manifest(out)
    assert copied.identity == data.identity
    for shard in data.shards:
        assert (out / shard).read_bytes() == Path(data.location, shard).read_bytes()
    front, text = (out / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert "# My \\*sounds\\*" in text
    assert f"12 clips in {len(data.shards)} WebDataset shards" in text
    assert hash_of_ids(data.clip_ids) in text


def test_a_store_gets_its_card_in_its_own_folder_and_once(
    data: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    fill_store(store, data, np.zeros((12, 5)), stamp=stamp_for(data, "passt_s"))
    before = {path.name: path.read_bytes() for path in Path(store).iterdir()}
    assert cli.run(["publish", store, "--to", store]) == 0
    text = Path(store, "README.md").read_text()
    assert "for 12 clips and 5 classes" in text
    assert "| `passt_s` | 1 | Apache-2.0 |" in text
    assert {path.name: path.read_bytes() for path in Path(store).iterdir() if path.name in before} == before
    assert len(open_store(store).parts) == len(data.shards)
    assert cli.run(["publish", store, "--to", store]) == 2
    assert "README.md is there already" in capsys.readouterr().err


def test_an_empty_dataset_has_a_card_all_the_same(build_dataset: Callable[..., Manifest], tmp_path: Path) -> None:
    empty = build_dataset("empty", [])
    assert cli.run(["publish", empty.location, "--to", str(tmp_path / "out")]) == 0
    assert "0 clips in 0 WebDataset shards" in (tmp_path / "out" / "README.md").read_text()
