"""Which clips go to the evaluation side of a split: by the hash of their ids, and evened out by label where wanted."""

from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import numpy as np

from pipeline.dataset.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.storage import files as storage

_HASH_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A rule that divides any dataset in two.

    Each id has a number from 0 to 1, from its hash and the seed. Clips below `eval_share` are for evaluation: that
    asks for nothing but the id, so a clip falls on the same side whatever else is in the dataset, and a larger share
    only adds clips to that side. Every class then has its share up to chance: of 20 clips and a share of 0.1, one time
    in eight none.

    `stratify` takes of each class, the rarest first, those with the lowest numbers until its share is full to the
    nearest clip, and at least one on each side where a class has two. That can't be had without looking at the other
    clips: a clip whose number is near the share may change sides when others of its classes come or go.
    """

    eval_share: float
    seed: int = 0
    stratify: bool = False

    def of_eval(self, manifest: Manifest) -> np.ndarray:
        """Returns which clips are for evaluation: (clips,) bool."""
        numbers = hash_numbers(manifest.clip_ids.to_pylist(), self.seed)
        return _stratified(manifest, numbers, self.eval_share) if self.stratify else numbers < self.eval_share


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a split, as the choice of clips that a copy takes."""

    split: Split
    is_eval: bool

    def __call__(self, manifest: Manifest) -> np.ndarray:
        """Returns which clips are on this side: (clips,) bool."""
        return self.split.of_eval(manifest) == self.is_eval


def hash_numbers(clip_ids: list[str], seed: int) -> np.ndarray:
    """Returns a number for each id, 0 or more and below 1, the same on every machine: (clips,) float64."""
    start = sha256(f"{seed} ".encode())
    numbers = np.empty(len(clip_ids), np.uint64)
    for row, clip_id in enumerate(clip_ids):
        digest = start.copy()
        digest.update(clip_id.encode())
        numbers[row] = int.from_bytes(digest.digest()[:_HASH_BYTES], "big")
    # 53 bits are all that a float64 holds; rounding up to 1 would put a clip on neither side.
    return (numbers >> np.uint64(11)) / 2.0**53


def _stratified(manifest: Manifest, numbers: np.ndarray, share: float) -> np.ndarray:
    in_eval = np.zeros(len(manifest), bool)
    decided = np.zeros(len(manifest), bool)
    order = np.lexsort((manifest.clip_ids.to_numpy(zero_copy_only=False), numbers))  # (clips,)
    for rows in _clips_of_classes(manifest, order):
        wanted = _quota(len(rows), share) - int(in_eval[rows].sum())
        left = rows[~decided[rows]]  # by number
        in_eval[left[: max(wanted, 0)]] = True
        decided[rows] = True
    return in_eval


def _quota(clips: int, share: float) -> int:
    return min(max(round(clips * share), 1), clips - 1) if clips > 1 else round(clips * share)


def _clips_of_classes(manifest: Manifest, order: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of each class by falling rarity, and last of the clips without labels; each in `order`."""
    indptr, labels = manifest.labels_csr
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    row_of_label = np.repeat(np.arange(len(manifest)), np.diff(indptr))  # (labels,)
    by_class = np.lexsort((rank[row_of_label], labels))  # (labels,)
    bounds = np.searchsorted(labels[by_class], np.arange(len(manifest.vocabulary) + 1))
    rows = [row_of_label[by_class[start:end]] for start, end in pairwise(bounds)]
    rows.sort(key=len)
    return [*rows, order[np.diff(indptr)[order] == 0]]


def is_made(out: str, manifest: Manifest, of_side: np.ndarray) -> bool:
    """Returns whether one side of a split is there already, as when a run was stopped at the other.

    Args:
        out: the side's folder.
        manifest: of the dataset that is divided.
        of_side: (clips,) bool, which clips the side has.
    """
    if not storage.exists(storage.join_path(out, MANIFEST_NAME)):
        return False
    made = read_manifest(out)
    return made.identity == Manifest(out, manifest.table.filter(of_side), manifest.vocabulary).identity


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitResult:
    """How a dataset was divided."""

    train_clips: int
    eval_clips: int
    classes_without_eval: int
    """Classes with clips, but none for evaluation."""
    classes_without_train: int
    smallest_share: float
    """Of the classes with clips, the smallest share that is for evaluation, 0 to 1; 1 where there are none."""
    largest_share: float

    def __str__(self) -> str:
        """Returns one line for people."""
        share = self.eval_clips / (self.train_clips + self.eval_clips)
        return (
            f"{self.train_clips:,} clips for training, {self.eval_clips:,} for evaluation ({100 * share:.2f} %; of a "
            f"class {100 * self.smallest_share:.1f} to {100 * self.largest_share:.1f} %); classes without a clip for "
            f"evaluation: {self.classes_without_eval:,}, for training: {self.classes_without_train:,}"
        )


def divided(manifest: Manifest, in_eval: np.ndarray) -> SplitResult:
    """Count what each side of a split has: `in_eval` is (clips,) bool."""
    counts = manifest.label_counts()  # (classes,)
    of_eval = manifest.label_counts(np.flatnonzero(in_eval))
    shares = of_eval[counts > 0] / counts[counts > 0]
    return SplitResult(
        train_clips=int((~in_eval).sum()),
        eval_clips=int(in_eval.sum()),
        classes_without_eval=int(((counts > 0) & (of_eval == 0)).sum()),
        classes_without_train=int(((counts > 0) & (of_eval == counts)).sum()),
        smallest_share=float(shares.min(initial=1)),
        largest_share=float(shares.max(initial=0)),
    )
