"""The benchmark of handing out shards runs, with and without Ray, and every shard costs the same few messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster_scale import alone

ROOT = Path(__file__).resolve().parents[1]


def test_ten_times_the_shards_are_no_more_messages_a_shard() -> None:
    few, many = (alone(shards)["messages"] / shards for shards in (600, 6000))
    assert many <= few < 4


@pytest.mark.ray
def test_shards_are_handed_out_on_ray_to_actors_that_do_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.cluster_scale", "--shards", "60"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1].startswith("| on Ray | 60 |")
