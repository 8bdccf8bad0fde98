"""Runs and a store whose names are as bad as names can be, and a browser to see what pages make of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from browsers import open_browser
from made_stores import fill_store, stamp_for

import student
from pipeline.dataset.manifest import read_manifest, write_manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.training.checkpoints import save_weights

CLIPS = 12
CLASS_NAMES = (
    "</script><script>hacked=1</script>",
    "<img src=x onerror=hacked=1>",
    "ein Gerät, \"laut\" & 'leise'",
    "x",
)
NASTY = "<b onmouseover=hacked=1>"
COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}


class Made(NamedTuple):
    data: str
    store: str
    runs: tuple[str, str]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def made(make_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A dataset of four classes, a store and two runs."""
    folder = tmp_path_factory.mktemp("made")
    data = make_dataset(folder / "data", clips=CLIPS, classes=4)
    vocabulary = Vocabulary(tuple(LabelClass(index, f"/t/{index}", name) for index, name in enumerate(CLASS_NAMES)))
    table = read_manifest(data).table
    ids = pa.array([f"{NASTY}{number}" for number in range(CLIPS)])
    manifest = write_manifest(data, table.set_column(table.column_names.index("clip_id"), "clip_id", ids), vocabulary)
    logits = np.random.default_rng(0).normal(size=(CLIPS, 4)) + 2 * manifest.label_matrix(np.arange(CLIPS))
    store = fill_store(folder / "store", manifest, logits, stamp=stamp_for(manifest, "ideal"))
    runs = (str(folder / "first"), str(folder / "second"))
    for seed, run in enumerate(runs):
        write_run(Path(run), vocabulary, seed)
    return Made(str(data), store.location, runs)


def write_run(run: Path, vocabulary: Vocabulary, seed: int) -> None:
    """Leave behind what a training leaves."""
    torch.manual_seed(seed)
    model = student.create_model("mn01", num_classes=len(vocabulary), **COARSE)
    metadata = {"stage": "student", "model": "mn01", "kwargs": COARSE, "classes": len(vocabulary)}
    metadata |= {"vocabulary_sha256": vocabulary.sha256, "vocabulary": vocabulary.to_csv_bytes().decode()}
    save_weights(run / "best.safetensors", model.state_dict(), metadata)
    (run / "config.toml").write_text(f'run = "{run}"\nnote = "{NASTY}"\n[mixup]\nrate = {seed}.0\n')
    lines = [
        {"step": 4, "epoch": 0, "epoch/loss": 0.7},
        {"step": 4, "epoch": 0, "eval/mAP": 0.3},
        {"step": 8, "epoch": 1, "epoch/loss": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
