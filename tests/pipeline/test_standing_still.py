"""A disk or share that stands still ends whatever reads or writes there in threads: a line says at what and where."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_stores import fill_store, stamp_for
from published_logits import tagged_clips, write_efficientat

from pipeline.commands import import_logits
from pipeline.commands.import_logits import ImportLogitsConfig
from pipeline.dataset.manifest import Manifest
from pipeline.errors import LostProcessError
from pipeline.logits import reweighting
from pipeline.logits.imports import clip_logits
from pipeline.runtime import threads
from pipeline.verification.datasets import verify_dataset
from pipeline.verification.parts import verify_parts
from pipeline.verification.stores import LOGITS

WORKERS: dict[str, Any] = {"workers": 2, "advance": lambda count: None}


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(12, 5))


@pytest.fixture
def stand_still(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A call that does not come back until the test is over; who waits for it has no patience."""
    monkeypatch.setattr(threads, "PATIENCE_SECONDS", 0.5)
    reading, writing = os.pipe()
    yield lambda *_, **__: str(os.read(reading, 1))
    os.write(writing, bytes(100))


def test_checking_a_dataset(data: Manifest, stand_still: Callable[..., str]) -> None:
    shard = Path(data.location, data.shards[1])
    shard.unlink()
    os.mkfifo(shard)  # whoever opens it waits for somebody who writes
    with pytest.raises(LostProcessError, match=rf"{shard.name}: nothing has come of it for 0\.5 s: it is at open "):
        verify_dataset(data.location, decode=False, on_manifest=lambda count: None, **WORKERS)
    os.close(os.open(shard, os.O_RDWR))


def test_checking_a_store(data: Manifest, tmp_path: Path, stand_still: Callable[..., Any]) -> None:
    store = fill_store(tmp_path / "store", data, np.zeros((12, 5)))
    form = replace(LOGITS, read_part=stand_still)
    with pytest.raises(LostProcessError, match=r"tiny-000000\.parquet: nothing has come of it for 0\.5 s: it is at"):
        verify_parts(form, store.location, data, on_parts=lambda count: None, **WORKERS)


def test_reweighting_a_store(
    data: Manifest, tmp_path: Path, stand_still: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill_store(tmp_path / "store", data, np.zeros((12, 5)), stamp=stamp_for(data, "one"))
    monkeypatch.setattr(reweighting, "publish_part", stand_still)
    with pytest.raises(LostProcessError, match=r"tiny-000000: nothing has come of it for 0\.5 s: it is at"):
        reweighting.reweight(store, str(tmp_path / "out"), stamp_for(data, "other"))


def test_importing_logits(tmp_path: Path, stand_still: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tagged = tagged_clips(tmp_path)
    array, index = write_efficientat(tmp_path, tagged.ids, tagged.logits)
    monkeypatch.setattr(clip_logits, "publish_part", stand_still)
    with pytest.raises(LostProcessError, match=r"train-000000\.tar: nothing has come of it for 0\.5 s: it is at"):
        import_logits.run(ImportLogitsConfig(data=tagged.data, store=str(tmp_path / "store"), npy=array, index=index))
