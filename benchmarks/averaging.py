"""Measures how alike the errors of several teachers are, and which average of their logits scores best.

    pipeline teacher-logits --data EVAL --store own --keep-members --teacher NAME=FILE NAME=FILE
    pipeline import-logits --data EVAL --store other --parquet FILE --held logits
    python -m benchmarks.averaging --data EVAL --store own other

Every member of a store that keeps its members, and every other store whole, is a teacher. Tables in Markdown: each
teacher's mAP and the spread of its logits; the correlation of each pair's errors (label minus probability, over all
clips and classes that have a positive clip); and the mAP of averages over all teachers.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.logits.store import open_store
from pipeline.scoring.scoring import System, read_members, read_store
from student import tagging_scores


def mean_of_logits(logits: np.ndarray) -> np.ndarray:
    """(teachers, clips, classes) → (clips, classes): what stage 1 stores."""
    return logits.mean(axis=0)


def mean_of_evened_logits(logits: np.ndarray) -> np.ndarray:
    """(teachers, clips, classes) → (clips, classes): the mean once each teacher's logits spread by 1."""
    return (logits / logits.std(axis=(1, 2), keepdims=True)).mean(axis=0)


def mean_of_class_scores(logits: np.ndarray) -> np.ndarray:
    """(teachers, clips, classes) → (clips, classes): the mean of each class's own standard scores."""
    spread = np.maximum(logits.std(axis=1, keepdims=True), 1e-6)
    return ((logits - logits.mean(axis=1, keepdims=True)) / spread).mean(axis=0)


def mean_of_probabilities(logits: np.ndarray) -> np.ndarray:
    """(teachers, clips, classes) → (clips, classes)."""
    return probabilities(logits).mean(axis=0)


def mean_of_ranks(logits: np.ndarray) -> np.ndarray:
    """(teachers, clips, classes) → (clips, classes): the mean of a clip's ranks among all clips."""
    return logits.argsort(axis=1).argsort(axis=1).mean(axis=0)


AVERAGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "logits (what stage 1 stores)": mean_of_logits,
    "logits, each teacher's spread made 1": mean_of_evened_logits,
    "logits, each class's mean and spread made 0 and 1": mean_of_class_scores,
    "probabilities": mean_of_probabilities,
    "ranks": mean_of_ranks,
}


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the sigmoid, of any shape."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def read_teachers(stores: Sequence[str], manifest: Manifest) -> list[System]:
    """Returns the members of stores that keep them, and other stores as one teacher each."""
    opened = [open_store(store) for store in stores]
    return [system for store in opened for system in read_members(store, manifest) or [read_store(store, manifest)]]


def print_table(title: str, rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> None:
    """Print a Markdown table whose first column is text and whose others are numbers."""
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="dataset with labels that no teacher has learned from")
    parser.add_argument("--store", nargs="+", required=True, help="logit stores of its clips")
    options = parser.parse_args()
    manifest = read_manifest(options.data)
    teachers = read_teachers(options.store, manifest)
    failed = sorted({row for system in teachers for row in system.failures})
    rows = np.setdiff1d(np.arange(len(manifest)), failed)
    labels = manifest.label_matrix(rows)
    heard = labels.any(axis=0)  # classes with a positive clip
    labels = labels[:, heard]  # (clips, classes)
    logits = np.stack([system.logits[rows][:, heard].astype(np.float64) for system in teachers])
    names = [system.name for system in teachers]
    print(f"{len(rows)} clips of {manifest.location}, {labels.shape[1]} classes")

    def score(values: np.ndarray) -> str:
        return f"{tagging_scores(values, labels).mean_average_precision:.4f}"

    each = [(name, score(of), f"{of.std():.2f}") for name, of in zip(names, logits, strict=True)]
    print_table("Each teacher", each, ("teacher", "mAP", "spread of the logits"))
    errors = [(labels - probabilities(of)).ravel() for of in logits]
    pairs = [
        (f"{names[one]}, {names[other]}", f"{np.corrcoef(errors[one], errors[other])[0, 1]:.3f}")
        for one, other in combinations(range(len(names)), 2)
    ]
    print_table("Each pair", pairs, ("teachers", "correlation of their errors"))
    of_all = [(name, score(average(logits))) for name, average in AVERAGES.items()]
    print_table(f"Averages over {len(names)} teachers", of_all, ("mean of", "mAP"))


if __name__ == "__main__":
    main()
