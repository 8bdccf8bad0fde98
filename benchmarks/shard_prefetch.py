"""How long teachers wait between two shards, with and without decoding the next shard ahead.

    python -m benchmarks.shard_prefetch DATASET [--clips-per-shard 16] [--rounds 3]

DATASET is cut into small shards (its manifest alone: the bytes stay where they are), and the sample's two tiny teachers
label all of them, one shard after the other, alternately as before (the baseline: each shard begins with nothing
decoded) and with the next shard announced. Both in one process, by turns, on as many threads as torch finds.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa

from pipeline.dataset.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller, ShardReport
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.store import write_stamp

SAMPLE = Path(__file__).resolve().parents[1] / "manifests" / "sample"


def cut(dataset: str, folder: Path, clips_per_shard: int) -> Manifest:
    """Write a manifest in which every shard, a link to the whole one, has a few clips."""
    manifest = read_manifest(dataset)
    rows = manifest.table.to_pylist()
    for start in range(0, len(rows), clips_per_shard):
        shard = f"cut-{start:06d}.tar"
        source = rows[start]["shard"]
        (folder / shard).symlink_to(Path(dataset).resolve() / source)
        for row in rows[start : start + clips_per_shard]:
            row["shard"] = shard if row["shard"] == source else row["shard"]
    write_manifest(folder, pa.Table.from_pylist(rows, schema=SCHEMA), manifest.vocabulary)
    return read_manifest(folder)


def label(labeller: ShardLabeller, shards: list[str], *, ahead: bool) -> tuple[float, list[ShardReport]]:
    """Label all shards; give the seconds and the reports."""
    started = perf_counter()
    reports = [
        labeller.label_shard(shard, following=following if ahead else None)
        for shard, following in pairwise([*shards, None])
        if shard is not None
    ]
    return perf_counter() - started, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--clips-per-shard", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    teachers = tuple(TeacherSpec.parse(f"{name}={SAMPLE / name}.safetensors") for name in ("passt_tiny", "ast_tiny"))
    with tempfile.TemporaryDirectory() as folder:
        manifest = cut(given.dataset, Path(folder), given.clips_per_shard)
        store = str(Path(folder) / "store")
        stamp = stamp_teachers(teachers, manifest, "float32")
        write_stamp(store, stamp)
        labeller = ShardLabeller(
            LabellerConfig(data=folder, store=store, teachers=teachers, stamp=stamp, batch_size=given.batch_size)
        )
        label(labeller, manifest.shards[:2], ahead=True)  # warm
        seconds: dict[bool, list[float]] = {False: [], True: []}
        waits: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.rounds):
            for ahead in (False, True):
                taken, reports = label(labeller, manifest.shards, ahead=ahead)
                seconds[ahead].append(taken)
                waits[ahead].append(sum(report.waiting_seconds for report in reports) / taken)
        labeller.close()
    print(f"{len(manifest)} clips in {len(manifest.shards)} shards, batch {given.batch_size}, {given.rounds} rounds")
    for ahead, name in ((False, "baseline, one shard at a time"), (True, "next shard decoded ahead")):
        speed, share = len(manifest) / np.median(seconds[ahead]), np.median(waits[ahead])
        print(f"{name}: {speed:.2f} clips/s, teachers wait {100 * share:.1f} % of the time")
    ratios = [before / after for before, after in zip(seconds[False], seconds[True], strict=True)]
    print(f"speed ratio, median of the pairs: {np.median(ratios):.3f} x baseline")


if __name__ == "__main__":
    main()
