"""How long the intervals of an evaluation take, against resampling the clips and scoring them anew each time.

    python -m benchmarks.bootstrap --clips 20000 --classes 527

Seconds are of CPU time. The baseline, `student.tagging_scores` of drawn rows, is measured on a few replicates.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from student import bootstrap_mean_average_precision, tagging_scores


def main() -> None:
    """Measure both on made scores and labels, 2.7 of a clip as in AudioSet, and print a line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--plain-replicates", type=int, default=2)
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (settings.clips, settings.classes)
    share = 1 / np.arange(1, settings.classes + 1)
    targets = rng.random(shape) < np.minimum(2.7 * share / share.sum(), 0.5)
    scores = (rng.standard_normal(shape) + 2.5 * targets).astype(np.float32)
    drawn = [rng.integers(settings.clips, size=settings.clips) for _ in range(settings.plain_replicates)]
    plain = seconds(lambda: [tagging_scores(scores, targets, rows) for rows in drawn]) / len(drawn)
    ours = seconds(lambda: bootstrap_mean_average_precision(scores, targets, replicates=settings.replicates))
    each = ours / settings.replicates
    print(f"one replicate after the other: {plain:.2f} s each, {plain * settings.replicates:.0f} s in all")
    print(f"weighted, sorted once: {each:.4f} s each, {ours:.1f} s in all: {plain / each:.0f} x")


def seconds(work: Callable[[], object]) -> float:
    """Returns how much CPU time some work takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
