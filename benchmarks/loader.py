"""Compares the loader with bare decoding: the whole way from byte ranges to batches against `soundfile` alone.

    OMP_NUM_THREADS=1 python -m benchmarks.loader --data DATASET

The baseline decodes the same bytes, held in memory, in as many processes, and does nothing with the result. `decode and
resample` is the work that nobody can leave out. The three take turns; ratios are medians of the rounds' ratios, and
those of CPU time count every process. Then the parts of the way are timed one by one, by format and rate, and the
memory of the workers is measured with stores of two sizes.
"""

import argparse
import io
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow as pa
import soundfile
import torch

from benchmarks.bare_decoding import RATE_HZ, SECONDS, BareReader, decode_and_resample, decode_bare
from pipeline.batches.join import JoinedDataset, batch_loader
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.decoding.pool import DecodingPool
from pipeline.logits.alignment import AlignedLogits, write_aligned
from pipeline.storage.files import RangeReader

Clips = list[bytes]


def make_logits(folder: Path, manifest: Manifest) -> AlignedLogits:
    """A store's logits for every clip, as opening one gives them."""
    random = np.random.default_rng(0)
    shape = len(manifest), len(manifest.vocabulary)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(manifest), 10_000):
            rows = np.arange(first, min(first + 10_000, len(manifest)))
            yield rows, random.standard_normal((len(rows), shape[1]), np.float32).astype(np.float16)

    return write_aligned(folder / f"logits-{len(manifest)}.npy", shape, np.ones(len(manifest), bool), 0, pieces())


def repeat_manifest(manifest: Manifest, clips: int) -> Manifest:
    """Name the same sounds again and again, until there are as many clips."""
    table = manifest.table.take(pa.array(np.arange(clips) % len(manifest)))
    ids = pa.array([f"clip-{number}" for number in range(clips)])
    return Manifest(
        manifest.location, table.set_column(table.column_names.index("clip_id"), "clip_id", ids), manifest.vocabulary
    )


@contextmanager
def stopwatch(into: list[tuple[float, float]], clips: int) -> Iterator[None]:
    """Note the seconds, and the CPU seconds of this process and of children that ended, for each clip."""
    start, before = time.perf_counter(), os.times()
    yield
    after = os.times()
    into.append(((time.perf_counter() - start) / clips, (sum(after[:4]) - sum(before[:4])) / clips))


def spread(reader: BareReader, batches: list[range], processes: int) -> None:
    """Let processes of the loader's kind, started for it as the loader's are, take batches of clips in turn."""
    with DecodingPool(processes) as pool:
        for _ in pool.load(reader, batches):
            pass


def load_all(dataset: JoinedDataset, batches: list[np.ndarray], workers: int) -> None:
    """Take every batch from the loader."""
    for batch in batch_loader(dataset, batches, workers=workers):
        assert batch.valid.all(), batch.failures


def compare(dataset: JoinedDataset, clips: Clips, rows: np.ndarray, options: argparse.Namespace) -> None:
    """Time the whole way and the two that it is held against, in turns."""
    batches = np.array_split(rows, max(1, len(rows) // options.batch))
    parts = [range(start, min(start + options.batch, len(clips))) for start in range(0, len(clips), options.batch)]
    bare, resampling = BareReader("bare", clips), BareReader("resample", clips)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        with stopwatch(found["bare soundfile"], len(rows)):
            spread(bare, parts, options.workers)
        with stopwatch(found["decode and resample"], len(rows)):
            spread(resampling, parts, options.workers)
        with stopwatch(found["the whole loader"], len(rows)):
            load_all(dataset, batches, options.workers)
    print(f"\n{len(rows)} clips, {options.workers} processes, batches of about {len(batches[0])}\n")
    print("| | clips/s | CPU ms a clip | x bare decoding | in CPU time |\n|---|---:|---:|---:|---:|")
    baseline = np.array(found["bare soundfile"])
    for name, costs in found.items():
        wall, cpu = np.median(costs, axis=0)
        wall_ratio, cpu_ratio = np.median(baseline / np.array(costs), axis=0)
        print(f"| {name} | {1 / wall:.1f} | {1000 * cpu:.2f} | {wall_ratio:.2f} | {cpu_ratio:.2f} |")


def cpu_ms(action: Callable[[], object], repeats: int = 3) -> float:
    """The least that it took this thread."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return 1000 * min(times)


def show_parts(dataset: JoinedDataset, rows: np.ndarray, options: argparse.Namespace) -> None:
    """Time the parts of the way in this process, one by one."""
    manifest, reader = dataset.manifest, RangeReader(dataset.manifest.location)
    total: dict[str, float] = defaultdict(float)
    kinds: dict[tuple[str, int, int], list[tuple[float, float]]] = defaultdict(list)
    sample = rows[:: max(1, len(rows) // options.parts)]
    for row in sample.tolist():
        data = read_clip_bytes(reader, manifest, row)
        read = cpu_ms(lambda row=row: read_clip_bytes(reader, manifest, row))
        bare = cpu_ms(lambda data=data: decode_bare(data))
        ours = cpu_ms(lambda data=data: decode_and_resample(data))
        for name, ms in (("bare soundfile", bare), ("range read and CRC", read), ("decode, mix, resample, pad", ours)):
            total[name] += ms
        info = soundfile.info(io.BytesIO(data))
        kinds[f"{info.format} {info.subtype}", info.samplerate, info.channels].append((bare, ours))
    batches = np.array_split(rows, max(1, len(rows) // options.batch))
    of_batches = [
        cpu_ms(lambda part=part: (manifest.label_matrix(part), dataset.reader._teacher_logits(part)))
        for part in batches
    ]
    total["join: labels and logits"] = median(of_batches) * len(sample) / len(batches[0])
    print(f"\n| part, {len(sample)} clips in one process | CPU ms a clip | share of bare decoding |\n|---|---:|---:|")
    for name, ms in total.items():
        print(f"| {name} | {ms / len(sample):.3f} | {100 * ms / total['bare soundfile']:.1f} % |")
    print("\n| format | rate, Hz | channels | clips | bare, ms | decode, mix, resample, pad, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for (kind, rate, channels), times in sorted(kinds.items()):
        bare, ours = np.mean(times, axis=0)
        print(f"| {kind} | {rate} | {channels} | {len(times)} | {bare:.2f} | {ours:.2f} |")


def show_memory(manifest: Manifest, folder: Path, options: argparse.Namespace) -> None:
    """Print what a worker holds for itself, and what it maps, with a small store and a large one."""
    print("\n| clips in store and manifest | store, MB | private memory of a worker, MB |\n|---:|---:|---:|")
    for clips in (len(manifest), options.large_store):
        large = repeat_manifest(manifest, clips)
        logits = make_logits(folder, large)
        dataset = JoinedDataset(large, sample_rate_hz=RATE_HZ, seconds=SECONDS, logits=logits)
        batches = np.random.default_rng(0).integers(0, clips, (200, 8))
        loader = iter(batch_loader(dataset, list(batches), workers=options.workers))
        list(islice(loader, 20 * options.workers))
        held = [process.memory_full_info().uss for process in psutil.Process().children()]
        size = logits.path.stat().st_size
        print(f"| {clips:,} | {size / 1e6:.0f} | {', '.join(f'{uss / 1e6:.0f}' for uss in held)} |")
        del loader
        logits.path.unlink()


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="a dataset with a manifest")
    parser.add_argument("--clips", type=int, default=1_000, help="clips a round, drawn from the dataset")
    parser.add_argument("--workers", type=int, default=2, help="processes of each contender")
    parser.add_argument("--batch", type=int, default=16, help="clips a batch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--parts", type=int, default=200, help="clips whose parts are timed one by one")
    parser.add_argument("--large-store", type=int, default=200_000, help="clips of the larger store; 1 GB a million")
    options = parser.parse_args()
    torch.set_num_threads(1)
    manifest = read_manifest(options.data)
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        folder = Path(temporary)
        dataset = JoinedDataset(manifest, sample_rate_hz=RATE_HZ, seconds=SECONDS, logits=make_logits(folder, manifest))
        rows = np.random.default_rng(0).permutation(len(manifest))[: options.clips]
        reader = RangeReader(manifest.location)
        clips = [read_clip_bytes(reader, manifest, int(row)) for row in rows]
        compare(dataset, clips, rows, options)
        show_parts(dataset, rows, options)
        show_memory(manifest, folder, options)


if __name__ == "__main__":
    main()
