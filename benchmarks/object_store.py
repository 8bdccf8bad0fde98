"""Clips a second from an S3 server: one request after the other, side by side, near ones merged; and one large object.

    python -m benchmarks.object_store [--latency 0.02] [--clips 256] [--batch 64] [--object-mb 0] [--endpoint URL]

Without `--endpoint` the server is that of the tests, `rclone serve s3` on loopback. With it, another one whose bucket
`distill` may be written to with the credentials of the environment. A latency is that of a proxy which waits before
each answer; with 0 and an endpoint there is no proxy, and no requests are counted. The baseline reads one clip after
the other, as a loader without reading ahead does. Far clips are drawn at random. Each figure is of a new process, so
that CPU time and peak memory are its own. To compare two versions of the code, run
`PYTHONPATH=CHECKOUT python benchmarks/object_store.py …` with either checkout, in turns.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from object_servers import (  # pyright: ignore[reportMissingImports]
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Proxy,
    proxy_before,
    s3_server,
)

from pipeline.storage import files as storage

CLIP_BYTES = 160_000
SHARDS, SHARD_CLIPS = 4, 128
FOLDER = f"s3://{BUCKET}/shards"


def read_clips(way: str, clips: int, batch: int) -> dict[str, float]:
    """Read clips in one of the ways; gives clips a second, CPU time in ms a clip, and the peak of memory in MB."""
    reader = storage.RangeReader(FOLDER)
    reader.read("0.tar", 0, 10)  # the connection
    rows = np.random.default_rng(0).permutation(SHARDS * SHARD_CLIPS)[:clips]
    rows = np.sort(rows) if way == "side by side, sorted" else rows
    started, cpu = time.perf_counter(), _cpu_seconds()
    for start in range(0, clips, batch):
        wanted = [
            storage.StoredRange(f"{row // SHARD_CLIPS}.tar", row % SHARD_CLIPS * CLIP_BYTES, CLIP_BYTES - 1024)
            for row in rows[start : start + batch].tolist()
        ]
        if way == "one after the other":
            found = [reader.read(one.name, one.offset, one.size) for one in wanted]
        else:
            found = reader.read_many(wanted)
        assert [len(one) for one in found if isinstance(one, bytes)] == [CLIP_BYTES - 1024] * len(wanted)
    seconds = time.perf_counter() - started
    return {"a second": clips / seconds, "CPU": 1000 * (_cpu_seconds() - cpu) / clips, "peak": _peak_mb()}


def move_object(way: str, megabytes: int, scratch: str) -> dict[str, float]:
    """Put or fetch a large object; gives MB a second, CPU time in s, and the peak of memory in MB."""
    location = f"s3://{BUCKET}/large.bin"
    with storage.publish(location) if way == "put" else nullcontext(Path(scratch) / "unused") as path:
        if way == "put":
            with path.open("wb") as stream:
                for _ in range(megabytes):
                    stream.write(os.urandom(1_000_000))
        started, cpu = time.perf_counter(), _cpu_seconds()
    if way == "fetch":
        with storage.local_copy(location) as copy:
            assert copy.stat().st_size == megabytes * 1_000_000
    seconds = time.perf_counter() - started
    return {"a second": megabytes / seconds, "CPU": _cpu_seconds() - cpu, "peak": _peak_mb()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mb() -> float:
    # Not ru_maxrss, which a process takes over from the one that started it.
    told = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    return int(told.split()[0]) / 1024


def in_a_new_process(function: Any, *given: object) -> dict[str, float]:
    """Give what a function returns in a Python of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


@contextmanager
def served(endpoint: str | None, latency: float) -> Iterator[Proxy | None]:
    """Let the environment name a server while the block lasts; gives the proxy before it, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        if endpoint is None:
            os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        with nullcontext() if endpoint else s3_server(Path(folder) / "objects") as server:
            port = server.port if server else urlsplit(endpoint).port
            with proxy_before(port) if latency or server else nullcontext() as proxy:
                os.environ |= {"AWS_ENDPOINT_URL": proxy.endpoint if proxy else str(endpoint)}
                os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
                yield proxy


def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--latency", type=float, default=0.02, help="seconds a request")
    options.add_argument("--clips", type=int, default=256)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--object-mb", type=int, default=0, help="also put and fetch an object of this size")
    options.add_argument("--endpoint", help="of another S3 server on this machine")
    asked = options.parse_args()
    with served(asked.endpoint, asked.latency) as proxy, tempfile.TemporaryDirectory() as scratch:
        for shard in range(SHARDS):
            storage.publish_bytes(f"{FOLDER}/{shard}.tar", os.urandom(SHARD_CLIPS * CLIP_BYTES))
        if proxy:
            proxy.latency_seconds = asked.latency
        print(f"{1000 * asked.latency:g} ms a request, clips of {CLIP_BYTES / 1e3:g} kB, batches of {asked.batch}")
        baseline = 0.0
        for way in ("one after the other", "side by side, far", "side by side, sorted"):
            if proxy:
                proxy.requests.clear()
            found = in_a_new_process(read_clips, way, asked.clips, asked.batch)
            baseline = baseline or found["a second"]
            requests = f"{(len(proxy.requests) - 1) / asked.clips:.2f}" if proxy else "?"
            print(
                f"{way:21} {found['a second']:8.1f} clips/s  {found['a second'] / baseline:5.2f} x  "
                f"{requests} requests and {found['CPU']:.2f} ms of CPU a clip, peak {found['peak']:.0f} MB"
            )
        for way in ("put", "fetch") if asked.object_mb else ():
            found = in_a_new_process(move_object, way, asked.object_mb, scratch)
            print(
                f"{way} {asked.object_mb} MB {found['a second']:8.1f} MB/s  {found['CPU']:.2f} s of CPU, "
                f"peak {found['peak']:.0f} MB"
            )


if __name__ == "__main__":
    main()
