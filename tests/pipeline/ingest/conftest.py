"""A few real sounds, and a short way to look into what was made of them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from published_copies import RealClip, real_clips

from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.storage.files import RangeReader


@pytest.fixture(scope="session")
def mp3s() -> list[RealClip]:
    return real_clips("mp3", 4)


@pytest.fixture
def contents():
    """Returns clip id → (labels, bytes) of a dataset."""

    def contents(dataset: Path | str) -> dict[str, tuple[list[int], bytes]]:
        manifest, reader = read_manifest(dataset), RangeReader(dataset)
        labels = manifest.table["labels"].to_pylist()
        return {
            clip_id: (labels[row], read_clip_bytes(reader, manifest, row))
            for row, clip_id in enumerate(manifest.clip_ids.to_pylist())
        }

    return contents


@pytest.fixture
def rejected():
    """Returns (clip id, path, reason) of what a dataset left out."""

    def rejected(dataset: Path) -> list[tuple[str | None, str | None, str]]:
        rows = pq.read_table(dataset / "rejected.parquet").to_pylist()
        return [(row["clip_id"], row["path"], row["reason"]) for row in rows]

    return rejected
