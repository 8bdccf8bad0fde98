"""The benchmark of handing out shards runs, with and without Ray, and every shard costs the same few messages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.ray
def test_shards_are_handed_out_to_actors_that_do_nothing_and_counted() -> None:
    command = [sys.executable, "-m", "benchmarks.cluster_scale", "--shards", "60", "--alone", "60", "6000"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=150)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("on Ray", "60"), ("alone", "60"), ("alone", "6,000")]
    few, many = (float(row[10]) for row in rows[1:])
    assert many <= few, "messages a shard"
