"""How fast stage 1 reads shards from an S3 server: long ranges ahead of the decoders, against one connection.

    python -m benchmarks.shard_reading [--latencies 0.02 0.05] [--megabytes 128] [--connection-mb 40]

The baseline is one GET of a whole shard, read to its end: what one connection brings. `clip by clip` reads a share of a
batch with a request when a decoder wants it, as without reading ahead. The server is that of the tests, `rclone serve
s3` on loopback, behind a proxy that waits before each answer and sends no faster than `--connection-mb` MB/s over a
connection, as networks do. Nothing is decoded: the processes would be slower than all of it on two cores.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from benchmarks.object_store import served
from pipeline.dataset.manifest import Manifest
from pipeline.labelling.shard_fetching import ShardFetcher
from pipeline.runtime.threads import Threads
from pipeline.storage import files as storage
from pipeline.storage.remote.calls import call

CLIP_BYTES, BATCH, SHARE = 160_000, 16, 4
"""A clip of AudioSet as FLAC or MP3 has so many; clips a batch, and of these a process's share on four cores."""
FOLDER = "s3://distill/reading"


def whole_shard(clips: int) -> int:
    """Read a shard with one request; gives its bytes."""
    return call(f"{FOLDER}/0.tar", lambda store, path: sum(len(some) for some in store.get(path).stream(1 << 20)))


def clip_by_clip(clips: int) -> int:
    """Read a share of a batch with each request."""
    reader, read = storage.RangeReader(FOLDER), 0
    for start in range(0, clips, SHARE):
        wanted = [storage.StoredRange("0.tar", row * CLIP_BYTES, CLIP_BYTES) for row in range(start, start + SHARE)]
        read += sum(len(cast("bytes", found)) for found in reader.read_many(wanted))
    return read


def long_ranges_ahead(clips: int) -> int:
    """Read as stage 1 does, and take each batch's bytes out of what was fetched."""
    manifest = SimpleNamespace(
        location=FOLDER,
        offsets=np.arange(clips, dtype=np.int64) * CLIP_BYTES,
        sizes=np.full(clips, CLIP_BYTES, np.int64),
    )
    batches = [list(range(start, min(start + BATCH, clips))) for start in range(0, clips, BATCH)]
    read = 0
    with Threads(2, "fetch") as threads:
        fetcher = ShardFetcher(cast("Manifest", manifest), "0.tar", batches, threads)
        for number, rows in enumerate(batches):
            stretch = fetcher.take(number)
            assert stretch is not None
            read += sum(len(one) for one in stretch.place.read([(row * CLIP_BYTES, CLIP_BYTES) for row in rows]))
    return read


def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--latencies", type=float, nargs="+", default=[0.02, 0.05], help="seconds a request")
    options.add_argument("--megabytes", type=int, default=128, help="of the shard")
    options.add_argument("--connection-mb", type=float, default=40, help="MB/s over a connection; 0 is no limit")
    asked = options.parse_args()
    clips = asked.megabytes * 1_000_000 // CLIP_BYTES // BATCH * BATCH
    with served(None, 0.001) as proxy:
        assert proxy is not None
        storage.publish_bytes(f"{FOLDER}/0.tar", os.urandom(clips * CLIP_BYTES))
        proxy.bytes_per_second = 1e6 * asked.connection_mb
        for latency in asked.latencies:
            proxy.latency_seconds = latency
            print(f"{1000 * latency:g} ms a request, clips of {CLIP_BYTES / 1e3:g} kB, {asked.connection_mb:g} MB/s")
            baseline = 0.0
            for name, way in _ways():
                proxy.requests.clear()
                started = time.perf_counter()
                read = way(clips)
                assert read == clips * CLIP_BYTES
                speed = read / 1e6 / (time.perf_counter() - started)
                baseline = baseline or speed
                requests = f"{len(proxy.requests)} requests"
                print(f"  {name:28} {speed:7.1f} MB/s  {speed / baseline:5.2f} x  {requests}")


def _ways() -> Iterator[tuple[str, Callable[[int], Any]]]:
    yield "one connection, whole shard", whole_shard
    yield "clip by clip", clip_by_clip
    yield "long ranges ahead", long_ranges_ahead


if __name__ == "__main__":
    main()
