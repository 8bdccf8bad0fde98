"""Measures a manifest of many clips: time and memory to write, open and use it.

python -m benchmarks.manifest --clips 2000000
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.vocabulary import audioset_vocabulary

Result = TypeVar("Result")


def synthetic_rows(clips: int, clips_per_shard: int = 1000) -> pa.Table:
    """Make rows like AudioSet's: ids of 11 characters, 1 to 4 of 527 labels, every column filled."""
    random = np.random.default_rng(0)
    digits = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
    numbers = random.permutation(clips)
    characters = np.stack([digits[(numbers >> (6 * place)) % 64] for place in range(11)], axis=1)  # (clips, 11)
    counts = random.integers(1, 5, clips)
    shards = pa.array([f"train-{shard:06d}.tar" for shard in range(-(-clips // clips_per_shard))])
    columns = {
        "clip_id": pa.array(characters.view("S11").ravel().astype(str)),
        "shard": shards.take(pa.array(np.arange(clips) // clips_per_shard)),
        "offset": np.arange(clips) % clips_per_shard * 300_000,
        "size": random.integers(100_000, 500_000, clips),
        "format": pa.array(["flac"]).take(pa.array(np.zeros(clips, np.int32))),
        "labels": pa.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            random.integers(0, 527, counts.sum()).astype(np.int16),
        ),
        "sample_rate": np.full(clips, 44_100, np.int32),
        "frames": np.full(clips, 441_000),
        "start_seconds": np.full(clips, 30, np.float32),
        "end_seconds": np.full(clips, 40, np.float32),
        "crc32": random.integers(0, 2**32, clips).astype(np.uint32),
    }
    return pa.table(columns).cast(SCHEMA)


def timed(what: str, action: Callable[[], Result]) -> Result:
    """Run `action`, and print how long it took and what memory the process holds then."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = action()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text().splitlines()
    held, peak = (
        next(int(line.split()[1]) // 1024 for line in status if line.startswith(key)) for key in ("VmRSS", "VmHWM")
    )
    print(f"| {what} | {seconds:.2f} | {cpu_seconds:.2f} | {held} | {peak} |")
    return result


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, help="keep the dataset here; opening it anew measures opening alone")
    options = parser.parse_args()
    print("| | s | CPU s | memory, MB | peak, MB |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        timed("start", lambda: None)
        if not (folder / "manifest.parquet").exists():
            rows = synthetic_rows(options.clips)
            timed("write", lambda: write_manifest(folder, rows, audioset_vocabulary()))
            del rows
        use(timed("open", lambda: read_manifest(folder)))


def use(manifest: Manifest) -> None:
    """Time what a run does with an open manifest."""
    rows = np.random.default_rng(0).integers(0, len(manifest), 1000)
    timed("identity", lambda: manifest.identity)
    timed("counts of all classes", manifest.label_counts)
    timed("labels of 1000 clips", lambda: manifest.label_matrix(rows))
    timed("rows of a shard", lambda: manifest.rows_of_shard(manifest.shards[-1]))
    timed("identities of all shards", lambda: [manifest.shard_identity(shard) for shard in manifest.shards])


if __name__ == "__main__":
    main()
