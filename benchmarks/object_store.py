"""Clips a second from an S3 server behind a slow line: one request after the other, side by side, near ones merged.

    python benchmarks/object_store.py [--latency 0.02] [--clips 256] [--batch 64]

The server is `rclone serve s3` on loopback; the line is a proxy that waits before each answer. The baseline reads one
clip after the other, as a loader without reading ahead does. Far clips are drawn at random.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
SHARD_CLIPS = 128
FOLDER = f"s3://{BUCKET}/shards"


def ranges(rows: np.ndarray) -> list[storage.StoredRange]:
    """Returns the places of clips, (clips,) int64."""
    return [
        storage.StoredRange(f"{row // SHARD_CLIPS}.tar", row % SHARD_CLIPS * CLIP_BYTES, CLIP_BYTES - 1024)
        for row in rows.tolist()
    ]


def measure(proxy: Proxy, batches: list[list[storage.StoredRange]], read: Callable[..., object]) -> tuple[float, float]:
    """Returns clips a second, and requests a clip."""
    proxy.requests.clear()
    started = time.perf_counter()
    for batch in batches:
        read(batch)
    clips = sum(map(len, batches))
    return clips / (time.perf_counter() - started), len(proxy.requests) / clips


def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--latency", type=float, default=0.02, help="seconds a request")
    options.add_argument("--clips", type=int, default=256)
    options.add_argument("--batch", type=int, default=64)
    asked = options.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server(Path(folder) / "objects") as server,
        proxy_before(server.port) as proxy,
    ):
        os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        os.environ |= {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        shards = 4
        for shard in range(shards):
            storage.publish_bytes(f"{FOLDER}/{shard}.tar", os.urandom(SHARD_CLIPS * CLIP_BYTES))
        proxy.latency_seconds = asked.latency
        rows = np.random.default_rng(0).permutation(shards * SHARD_CLIPS)[: asked.clips]
        far = [ranges(rows[start : start + asked.batch]) for start in range(0, asked.clips, asked.batch)]
        near = [ranges(np.sort(rows)[start : start + asked.batch]) for start in range(0, asked.clips, asked.batch)]
        reader = storage.RangeReader(FOLDER)
        reader.read("0.tar", 0, 10)  # the connection

        def one_by_one(batch: list[storage.StoredRange]) -> None:
            for clip in batch:
                reader.read(clip.name, clip.offset, clip.size)

        baseline, requests = measure(proxy, far, one_by_one)
        print(f"{1000 * asked.latency:g} ms a request, clips of {CLIP_BYTES / 1e3:g} kB, batches of {asked.batch}")
        print(f"one after the other   {baseline:8.1f} clips/s  {requests:.2f} requests a clip  1.00 x (baseline)")
        for name, batches in (("side by side, far", far), ("side by side, sorted", near)):
            speed, requests = measure(proxy, batches, reader.read_many)
            print(f"{name:21} {speed:8.1f} clips/s  {requests:.2f} requests a clip  {speed / baseline:.2f} x")


if __name__ == "__main__":
    main()
