"""Measures `pipeline import-logits` on EfficientAT's layout: seconds, and private memory at the peak.

    python -m benchmarks.import_logits --folder FOLDER --clips 2000000

Writes a synthetic dataset and its logits, in another order, into FOLDER (1.1 GB a million clips,
and as much for the stores), then imports them. Baseline: the same array read from front to back and written as as many
Parquet files by as many threads, with no names, check, digest or stamp.
"""

import argparse
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.synthetic import CLASSES, CLIPS_PER_SHARD, write_dataset
from pipeline.runtime.cores import usable_cores


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the synthetic data is written")
    options = parser.parse_args()
    array, index = write_logits(options.folder, options.clips)
    start = time.perf_counter()
    write_plain(array, options.folder / "plain")
    baseline = time.perf_counter() - start
    command = [sys.executable, "-m", "pipeline", "import-logits", "--npy", str(array), "--index", str(index)]
    command += ["--data", str(options.folder / "data"), "--store", str(options.folder / "store"), "--overwrite"]
    shutil.rmtree(options.folder / "store", ignore_errors=True)
    for what in ("import", "rerun with nothing to do"):
        seconds, peak = watch(command)
        print(
            f"{what}: {seconds:.1f} s, {seconds / baseline:.2f} times plain writing ({baseline:.1f} s); "
            f"{peak:,.0f} MB private at the peak, {options.clips:,} clips",
            flush=True,
        )


def write_logits(folder: Path, clips: int) -> tuple[Path, Path]:
    """Write a dataset, and EfficientAT's two files for it."""
    array, index = folder / "logits.npy", folder / "fname_to_index.pkl"
    if index.exists():
        return array, index
    manifest = write_dataset(folder / "data", clips)
    random = np.random.default_rng(7)
    order = random.permutation(clips)
    noise = random.normal(-6, 2, (CLIPS_PER_SHARD, CLASSES)).astype(np.float16)
    target = np.lib.format.open_memmap(array, "w+", np.float16, (clips, CLASSES))
    for first in range(0, clips, CLIPS_PER_SHARD):
        rows = order[first : first + CLIPS_PER_SHARD]
        target[first : first + CLIPS_PER_SHARD] = noise[: len(rows)] + 5 * manifest.label_matrix(rows, np.float16)
    target.flush()
    names = manifest.clip_ids.take(pa.array(order)).to_pylist()
    index.write_bytes(pickle.dumps(dict(zip(names, range(clips), strict=True))))
    return array, index


def write_plain(array: Path, folder: Path) -> None:
    """Write an array's rows as Parquet files."""
    folder.mkdir(exist_ok=True)
    mapped = np.load(array, mmap_mode="r")

    def write(first: int) -> None:
        block = pa.array(np.ascontiguousarray(mapped[first : first + CLIPS_PER_SHARD]).reshape(-1))
        table = pa.table({"logits": pa.FixedSizeListArray.from_arrays(block, CLASSES)})
        pq.write_table(table, folder / f"{first}.parquet", compression="zstd", use_dictionary=False)

    with ThreadPoolExecutor(usable_cores()) as threads:
        list(threads.map(write, range(0, len(mapped), CLIPS_PER_SHARD)))


def watch(command: list[str]) -> tuple[float, float]:
    """Run a command: seconds, and megabytes of its own at the peak, besides the files that it maps."""
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.Error:
                break
            peak = max(peak, (memory.rss - memory.shared) / 1e6)  # pyright: ignore[reportAttributeAccessIssue]
            time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, peak


if __name__ == "__main__":
    main()
