"""Measures what two million clips cost: opening, planning, reading, memory of training and evaluating.

    python -m benchmarks.scale --folder FOLDER

The first run writes the synthetic data into FOLDER (6 GB at the end, in a minute or two); later ones measure at once.
Every measurement that concerns memory or a first opening has a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.synthetic import write_dataset, write_random_bytes, write_store
from pipeline.batches.join import JoinedDataset
from pipeline.batches.sampling import EpochSampler, Sampling, StreamConfig, build_sampler, reading_order
from pipeline.batches.shard_streams import stream_shard
from pipeline.batches.streaming import load_steps
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.decoding.pool import DecodingPool
from pipeline.logits.store import open_store
from pipeline.storage.files import RangeReader

FEW = 2000
CLIP_MB = 0.3
"""Of AudioSet as FLAC, about; what distances between reads are given in."""
JOINED_MB = 1.0
"""Ranges with a smaller gap between them can be read with one request."""


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the synthetic data is, or is written")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder / str(options.clips))))
        return
    for clips in (FEW, options.clips):
        prepare(options.folder / str(clips), clips)
    for step in options.only:
        print(f"\n**{step}**\n", flush=True)
        STEPS[step](options.folder, options.clips)


def prepare(folder: Path, clips: int) -> None:
    """Write a dataset and a store with logits for all its clips, unless they are there."""
    if not (folder / "store" / "done").exists():
        start = time.monotonic()
        write_store(folder / "store", write_dataset(folder / "data", clips))
        (folder / "store" / "done").touch()
        print(f"wrote {clips:,} clips and their logits in {time.monotonic() - start:.0f} s")


@contextmanager
def timed(times: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds that the block takes."""
    start = time.perf_counter()
    yield
    times[what] = time.perf_counter() - start


def in_child(name: str, folder: Path, clips: int) -> dict[str, float]:
    """Run one of `CHILDREN` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--child",
        name,
        "--folder",
        str(folder),
        "--clips",
        str(clips),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def open_once(folder: Path) -> dict[str, float]:
    """Open manifest and store and align them, from the cache where it is there; then plan an epoch."""
    times: dict[str, float] = {}
    with timed(times, "manifest"):
        manifest = read_manifest(folder / "data")
    with timed(times, "store"):
        store = open_store(str(folder / "store"))
    with timed(times, "alignment"):
        store.align(manifest, folder / "cache")
    times["all three"] = sum(times.values())
    with timed(times, "plan of the first epoch of 100,000"):
        sampler = build_sampler(manifest, sampling="balanced", batch_size=120, clips_per_epoch=100_000)
        sampler.order(0)
    with timed(times, "plan of the next epoch"):
        sampler.order(1)
    with timed(times, "stream plan of an epoch"):
        build_sampler(manifest, sampling="stream", batch_size=120, clips_per_epoch=100_000).order(1)
    return times


def opening(folder: Path, clips: int) -> None:
    """Seconds to open a dataset and its store, the first time and then again."""
    shutil.rmtree(folder / str(clips) / "cache", ignore_errors=True)
    first, again, few = (in_child("open", folder, number) for number in (clips, clips, FEW))
    print(f"| seconds | {clips:,} clips, first time | again | {FEW:,} clips |\n|---|---:|---:|---:|")
    for what in first:
        print(f"| {what} | {first[what]:.2f} | {again[what]:.2f} | {few[what]:.2f} |")


def memory(folder: Path, clips: int) -> None:
    """Private memory of a training process and of loader workers."""
    in_child("open", folder, FEW)
    print(f"| private memory (USS), MB | {FEW:,} clips | {clips:,} clips | more |\n|---|---:|---:|---:|")
    for measure in (lambda place: in_child("loaders", folder, int(place.name)), training_memory):
        few, many = (measure(folder / str(number)) for number in (FEW, clips))
        for what in few:
            row = f"{few[what]:,.0f} | {many[what]:,.0f} | {many[what] - few[what]:,.0f}"
            print(f"| {what} | {row} |", flush=True)


def loader_memory(folder: Path) -> dict[str, float]:
    """Load ten batches of 16 clips on two workers: megabytes of the larger one, in each kind of sampling."""
    manifest = read_manifest(folder / "data")
    logits = open_store(str(folder / "store")).align(manifest, folder / "cache")
    clips = JoinedDataset(manifest, sample_rate_hz=32_000, seconds=10, logits=logits)
    found: dict[str, float] = {}
    kinds: tuple[Sampling, ...] = ("balanced", "stream")
    for sampling in kinds:
        stream = StreamConfig(shuffle=100)
        sampler = build_sampler(manifest, sampling=sampling, batch_size=16, clips_per_epoch=960, stream=stream)
        peak = 0.0
        for _ in load_steps(clips, sampler, end_step=10, workers=2):
            peak = max([peak, *(private_memory(worker) or 0.0 for worker in psutil.Process().children())])
        found[f"each of two loader workers, --sampling {sampling}, peak"] = peak
    return found


def workers(folder: Path, clips: int) -> None:
    """Start-up and memory of sixteen loader workers."""
    in_child("open", folder, FEW)
    few, many = (in_child("workers", folder, number) for number in (FEW, clips))
    print(f"| sixteen loader workers | {FEW:,} clips | {clips:,} clips |\n|---|---:|---:|")
    for what in few:
        print(f"| {what} | {few[what]:,.1f} | {many[what]:,.1f} |")


def sixteen_workers(folder: Path) -> dict[str, float]:
    """Load two batches of 16 clips on each of sixteen workers."""
    manifest = read_manifest(folder / "data")
    logits = open_store(str(folder / "store")).align(manifest, folder / "cache")
    clips = JoinedDataset(manifest, sample_rate_hz=32_000, seconds=10, logits=logits)
    sampler = build_sampler(manifest, sampling="balanced", batch_size=16, clips_per_epoch=960)
    family = psutil.Process()
    used, start = sum(family.cpu_times()[:2]), time.perf_counter()
    with DecodingPool(16) as pool:  # more than most machines have cores for, so not by number
        steps = load_steps(clips, sampler, end_step=40, workers=pool)
        next(steps)
        found = {"seconds to the first batch": time.perf_counter() - start}
        cpu = sum(sum(process.cpu_times()[:2]) for process in (family, *family.children()))
        found["seconds of CPU until then, all processes"] = cpu - used
        for _ in range(31):
            next(steps)
        own, *workers = [process.memory_full_info() for process in (family, *family.children())]
        batches = [_shared_memory(worker) for worker in family.children()]
    found["private memory of a worker (USS), MB"] = float(np.mean([worker.uss for worker in workers])) / 1e6
    found["… of that in batches that it made, MB"] = float(np.mean(batches)) / 1e6
    found["share of a worker in all memory (PSS), MB"] = float(np.mean([worker.pss for worker in workers])) / 1e6
    found["all with the process that trains (PSS), MB"] = (own.pss + sum(worker.pss for worker in workers)) / 1e6
    return found


def _shared_memory(process: psutil.Process) -> int:
    """Bytes in memory that is made to be shared, though nobody else has looked at them yet."""
    maps: list[Any] = process.memory_maps()
    kinds = ("/memfd:", "/dev/shm/", "/torch_")
    return sum(one.private_clean + one.private_dirty for one in maps if one.path.startswith(kinds))


def training_memory(folder: Path) -> dict[str, float]:
    """Train a few steps and watch the process from outside: megabytes at the peak and at the median of all times."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = "--model mn01 --workers 0 --epochs 2 --clips-per-epoch 64 --batch-size 16 --device cpu"
    places = {"data": folder / "data", "store": folder / "store", "cache": folder / "cache", "run": run}
    command = [sys.executable, "-m", "pipeline", "train-student", *settings.split()]
    command += [part for name, place in places.items() for part in (f"--{name}", str(place))]
    seen: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if megabytes := private_memory(watched):
                seen.append(megabytes)
            time.sleep(0.3)
        if process.returncode:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "")
    shutil.rmtree(run)
    return {f"training process without workers, {name}": pick(seen) for name, pick in PICKS.items()}


PICKS: dict[str, Callable[[list[float]], float]] = {"peak": max, "median": lambda values: float(np.median(values))}


def private_memory(process: psutil.Process) -> float | None:
    """Megabytes that only this process has; None where it is gone."""
    try:
        return process.memory_full_info().uss / 1e6
    except psutil.Error:
        return None


def reading(folder: Path, clips: int) -> None:
    """Random reads of clips, one after the other, against plain `pread` of the same bytes."""
    manifest = own_bytes(folder / "bytes")
    rows = np.random.default_rng(3).permutation(len(manifest))
    reader = RangeReader(manifest.location)
    files = [os.open(Path(manifest.location) / shard, os.O_RDONLY) for shard in manifest.shards]
    places = list(zip(manifest.shard_of_clip.tolist(), manifest.offsets.tolist(), manifest.sizes.tolist(), strict=True))
    ways: dict[str, Callable[[int], object]] = {
        "pread": lambda row: os.pread(files[places[row][0]], places[row][2], places[row][1]),
        "RangeReader": lambda row: reader.read(manifest.shards[places[row][0]], places[row][1], places[row][2]),
        "read_clip_bytes, which checks CRC-32": lambda row: read_clip_bytes(reader, manifest, row),
    }
    print("| way | from the disk, MB/s | x pread | from the page cache, MB/s | x pread |\n|---|---:|---:|---:|---:|")
    speeds = {where: read_speeds(ways, rows, manifest, files, cold=where == "disk") for where in ("disk", "cache")}
    for way in ways:
        cells = [f"{speed[way]:,.0f} | {speed[way] / speed['pread']:.2f}" for speed in speeds.values()]
        print(f"| {way} | {' | '.join(cells)} |")
    print(f"\n{streaming_speed(manifest):,.0f} MB/s when streamed through webdataset, every fourth clip kept")


def own_bytes(folder: Path) -> Manifest:
    """Write, once, 2 GB in 8 tars whose clips hold bytes of their own, not links."""
    if not (folder / "manifest.parquet").exists():
        write_random_bytes(folder, shards=8, clips_per_shard=1000)
    return read_manifest(folder)


def read_speeds(
    ways: dict[str, Callable[[int], object]], rows: np.ndarray, manifest: Manifest, files: list[int], *, cold: bool
) -> dict[str, float]:
    """MB/s of each way; the median of rounds in which all take turns on the same clips."""
    rounds: dict[str, list[float]] = {way: [] for way in ways}
    for some in np.array_split(rows, 8):
        megabytes = float(manifest.sizes[some].sum()) / 1e6
        for way, read in ways.items():
            for file in files if cold else ():
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for row in some.tolist() if not cold else ():
                ways["pread"](row)
            start = time.perf_counter()
            for row in some.tolist():
                read(row)
            rounds[way].append(megabytes / (time.perf_counter() - start))
    return {way: float(np.median(speeds)) for way, speeds in rounds.items()}


def streaming_speed(manifest: Manifest) -> float:
    """MB/s that pass by when whole shards are streamed."""
    start, passed = time.perf_counter(), 0
    for shard in manifest.shards[:4]:
        rows = manifest.rows_of_shard(shard)
        passed += int(manifest.sizes[rows].sum())
        for _ in stream_shard(manifest.clips, shard, rows[::4].tolist()):
            pass
    return passed / 1e6 / (time.perf_counter() - start)


def windows(folder: Path, clips: int) -> None:
    """What a read window saves, and what it does to the batches."""
    manifest = read_manifest(folder / str(clips) / "data")
    by_class = np.empty(len(manifest), dtype=np.int64)  # as if shards had been packed class by class
    indptr, classes = manifest.labels_csr
    by_class[np.argsort(classes[indptr[:-1]], kind="stable")] = np.arange(len(manifest))
    print(
        "| --read-window | shards a batch | requests a batch | mean distance of reads, GB "
        "| pairs with a class in common | the same, shards sorted by class |\n|---:|---:|---:|---:|---:|---:|"
    )
    for window in (0, 1_200, 12_000, 100_000):
        cells = window_figures(manifest, reading_order(manifest), window)
        sorted_pairs = window_figures(manifest, by_class, window)[-1]
        print(
            f"| {window:,} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.3f} | {cells[3]:.3f} | {sorted_pairs:.3f} |"
        )
    for share in (1.0, 0.25):
        sampler = build_sampler(
            manifest,
            sampling="stream",
            batch_size=120,
            clips_per_epoch=100_000,
            stream=StreamConfig(read_share=share),
        )
        pairs = np.mean([common_class_share(manifest, batch) for batch in some_batches(sampler)])
        thrown = getattr(sampler, "discarded", 0.0)
        print(
            f"\n--stream.read-share {share}: {100 * thrown:.1f} % thrown away, pairs with a class in common {pairs:.3f}"
        )


def some_batches(sampler: EpochSampler) -> list[np.ndarray]:
    """Take every fourth batch of the first epoch."""
    order = sampler.order(0)
    return [order[first : first + sampler.batch_size] for first in range(0, len(order), 4 * sampler.batch_size)]


def window_figures(manifest: Manifest, numbers: np.ndarray, window: int) -> tuple[float, float, float, float]:
    """Shards, requests, distance and common classes, means over batches that lie where `numbers` says."""
    weights = build_sampler(manifest, sampling="balanced", batch_size=120).weights
    sampler = EpochSampler(
        weights=weights, batch_size=120, clips_per_epoch=100_000, numbers=numbers, read_window=window
    )
    batches = some_batches(sampler)
    read = [np.sort(numbers[batch]) for batch in batches]  # within a batch, reads are always in order
    gaps = [np.diff(numbers) for numbers in read]
    return (
        float(np.mean([len(np.unique(numbers // 1000)) for numbers in read])),
        float(np.mean([1 + int(((gap - 1) * CLIP_MB > JOINED_MB).sum()) for gap in gaps])),
        float(np.mean(np.concatenate(gaps))) * CLIP_MB / 1000,
        float(np.mean([common_class_share(manifest, batch) for batch in batches])),
    )


def common_class_share(manifest: Manifest, rows: np.ndarray) -> float:
    """Share of the pairs of a batch's clips that have a class in common, 0 to 1."""
    labels = manifest.label_matrix(rows)  # (batch, classes)
    common = labels @ labels.T > 0  # (batch, batch)
    return float((common.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def evaluating(folder: Path, clips: int) -> None:
    """Time and memory of `pipeline evaluate` on a store with logits of all clips."""
    places = folder / str(clips)
    command = [sys.executable, "-m", "pipeline", "evaluate", "--bootstrap", "0", "--data", str(places / "data")]
    command += ["--store", str(places / "store"), "--out", str(places / "report")]
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(watched))
            time.sleep(0.2)
    shutil.rmtree(places / "report")
    print(f"{time.perf_counter() - start:.0f} s, {peak:,.0f} MB at the peak besides mapped files, {clips:,} clips")


def anonymous_memory(process: psutil.Process) -> float:
    """Megabytes that the kernel can't take back: resident, but of no file."""
    try:
        status: Any = process.memory_info()
    except psutil.Error:
        return 0.0
    return (status.rss - status.shared) / 1e6


STEPS = {
    "opening": opening,
    "memory": memory,
    "workers": workers,
    "reading": reading,
    "windows": windows,
    "evaluating": evaluating,
}
CHILDREN = {"open": open_once, "loaders": loader_memory, "workers": sixteen_workers}

if __name__ == "__main__":
    main()
