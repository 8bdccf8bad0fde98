"""Measures `pipeline reshard`, the copy that split and merge are made of, and `pipeline verify`, against copying files.

    OMP_NUM_THREADS=1 python -m benchmarks.copying --scratch /tmp/copying

Makes a dataset of `--clips` clips of `--kilobytes` random bytes each. In turns: its tars copied with `shutil.copyfile`
and flushed to the disk (baseline); `pipeline reshard` to shards of three quarters the size; `pipeline verify`, which
reads but does not write. Prints each one's best MB/s of audio, and its ratio to the baseline.
"""

import argparse
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.commands.reshard_dataset import ReshardConfig
from pipeline.commands.reshard_dataset import run as reshard
from pipeline.commands.verify_path import VerifyConfig
from pipeline.commands.verify_path import run as verify
from pipeline.dataset.clips import Clip
from pipeline.dataset.manifest import SCHEMA, write_manifest
from pipeline.dataset.shards import open_shard
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.ingest.copying import CopyConfig

CLIPS_PER_SHARD = 1000


def make(dataset: Path, clips: int, size: int) -> None:
    """Write a dataset whose sounds nobody can decode: copying does not."""
    random, rows = np.random.default_rng(0), []
    mid = audioset_vocabulary().classes[0].mid
    for start in range(0, clips, CLIPS_PER_SHARD):
        shard, ids = f"d-{start // CLIPS_PER_SHARD:06}.tar", range(start, min(start + CLIPS_PER_SHARD, clips))
        checksums = []
        with open_shard(str(dataset), shard) as writer:
            for number in ids:
                audio = random.bytes(size)
                writer.write(Clip(clip_id=f"clip{number}", audio=audio, format="flac"), {"labels": [mid]})
                checksums.append(zlib.crc32(audio))
        rows += [
            {"clip_id": f"clip{number}", "shard": shard, "offset": offset, "size": length, "format": "flac"}
            | {"labels": [0], "crc32": checksum}
            for number, (offset, length), checksum in zip(ids, writer.ranges, checksums, strict=True)
        ]
    write_manifest(dataset, pa.Table.from_pylist(rows, schema=SCHEMA), audioset_vocabulary())


def copy_files(dataset: Path, out: Path) -> None:
    """Copy the tars as files, onto the disk."""
    out.mkdir()
    for tar in sorted(dataset.glob("*.tar")):
        shutil.copyfile(tar, out / tar.name)
        descriptor = os.open(out / tar.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds(work: Callable[[], object], out: Path) -> float:
    """Time one call, and remove what it made."""
    start = time.perf_counter()
    work()
    taken = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    return taken


def main() -> None:
    """Read the command line, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--kilobytes", type=int, default=250, help="of one clip; ten seconds of FLAC are about 500")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    dataset, out = arguments.scratch / "dataset", arguments.scratch / "out"
    make(dataset, arguments.clips, arguments.kilobytes * 1000)
    copies = CopyConfig(clips_per_shard=CLIPS_PER_SHARD * 3 // 4, workers=arguments.workers)
    cases: dict[str, Callable[[], object]] = {
        "copyfile (baseline)": lambda: copy_files(dataset, out),
        "reshard": lambda: reshard(ReshardConfig(str(dataset), out=str(out), copies=copies)),
        "verify": lambda: verify(VerifyConfig(str(dataset), workers=arguments.workers)),
    }
    times = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, work in cases.items():
            times[name].append(seconds(work, out))
    best = {name: min(taken) for name, taken in times.items()}
    baseline, megabytes = best["copyfile (baseline)"], arguments.clips * arguments.kilobytes / 1000
    for name, taken in best.items():
        speed, clips = megabytes / taken, arguments.clips / taken
        print(f"{name:20} {speed:8.0f} MB/s {clips:8.0f} clips/s {baseline / taken:6.2f} of the baseline")


if __name__ == "__main__":
    main()
