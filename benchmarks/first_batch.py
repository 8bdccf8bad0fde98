"""How long `pipeline teacher-logits` takes from the command to its first batch, part by part, with PaSST-S.

    python -m benchmarks.first_batch [--against CHECKOUT] [--rounds 3] [--teacher passt_s_swa_p16_128_ap476]

The weights are drawn at random; the batch is one clip, so that what is measured is what comes before. Another checkout
of this repository is measured in turns with this one. Times are medians; the machine's files are in its cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

import teacher
from benchmarks.synthetic import write_dataset
from pipeline.dataset.manifest import read_manifest
from pipeline.training.checkpoints import save_weights

PROGRAM = """
import json, sys, time
marks = {"start": time.perf_counter()}
def mark(name):
    marks.setdefault(name, time.perf_counter())
from contextlib import contextmanager
from pipeline.commands import teacher_logits as command
mark("imports of the command")
stamp_teachers = command.stamp_teachers
def stamped(*given, **more):
    found = stamp_teachers(*given, **more)
    mark("teachers loaded, hashed and checked")
    return found
command.stamp_teachers = stamped
from pipeline.cli import run
label = command._label
def label_and_look(*given, **more):
    from pipeline.labelling import actor_pool
    from pipeline.runtime import ray_session
    mark("imports of Ray")
    label_shards, running_ray = actor_pool.label_shards, ray_session.running_ray
    @contextmanager
    def timed_ray(address):
        with running_ray(address):
            mark("Ray started")
            yield
    def looked(*given, on_clips, **more):
        def tell(clips):
            if clips > 0:
                mark("actor started, teachers loaded, first batch")
            on_clips(clips)
        return label_shards(*given, on_clips=tell, **more)
    actor_pool.label_shards, ray_session.running_ray = looked, timed_ray
    return label(*given, **more)
command._label = label_and_look
code = run(sys.argv[1:])
print(json.dumps(marks))
sys.exit(code)
"""


def parts(checkout: Path, flags: list[str], store: Path) -> dict[str, float]:
    """Run the command in a checkout; returns the seconds of each part, in order."""
    command = [sys.executable, "-c", PROGRAM, "teacher-logits", *flags, "--store", str(store)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    marks = json.loads(done.stdout.splitlines()[-1])
    moments = sorted(marks.items(), key=lambda mark: mark[1])
    found = {name: moment - before for (_, before), (name, moment) in pairwise(moments)}
    return {**found, "all": moments[-1][1] - moments[0][1]}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--against", type=Path, help="another checkout, the baseline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teacher", default="passt_s_swa_p16_128_ap476")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    checkouts = {"here": here, **({"baseline": options.against.resolve()} if options.against else {})}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        write_dataset(folder / "data", 2, clips_per_shard=2)
        manifest = read_manifest(str(folder / "data"))
        torch.manual_seed(0)
        weights, sha256 = folder / "teacher.safetensors", manifest.vocabulary.sha256
        metadata = {"stage": "teacher", "model": options.teacher, "kwargs": {}, "classes": 527}
        save_weights(
            weights, teacher.create_model(options.teacher).state_dict(), {**metadata, "vocabulary_sha256": sha256}
        )
        flags = ["--data", manifest.location, "--teacher", f"{options.teacher}={weights}", "--batch-size", "1"]
        rounds = {name: [] for name in checkouts}
        for number in range(options.rounds):
            for name, checkout in checkouts.items():
                rounds[name].append(parts(checkout, flags, folder / f"store-{name}-{number}"))
    print(f"| part | {' | '.join(f'{name}, s' for name in checkouts)} |\n|---|{'---:|' * len(checkouts)}")
    for part in rounds["here"][0]:
        cells = (f"{median(found[part] for found in rounds[name]):.1f}" for name in checkouts)
        print(f"| {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
