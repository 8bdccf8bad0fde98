"""(clips, seed, epoch) → which clips a training run sees, in which order, in which batches.

Nothing here is drawn from hidden state. The clips of any step can be computed from the step's number alone, so a run
resumes in the middle of an epoch, on any number of loader workers, as if it had never stopped.

The order also decides how the shards are read. `EpochSampler` draws from the whole dataset and can sort its reads
within a window; `StreamSampler` draws the same clips, but puts them in an order in which whole shards are read from
their start to their end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Literal, TypeVar

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError

Sampling = Literal["balanced", "uniform", "stream"]
IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

_SHARDS, _SHUFFLE = 11, 12
"""What random numbers are for, so that no two uses share them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How `--sampling stream` goes through the shards."""

    weights: Literal["balanced", "uniform"] = "balanced"
    """balanced: clips of rare classes are kept more often, those on which nothing is to be heard never. uniform: all
    alike."""
    read_share: float = 1.0
    """Share of the dataset that one epoch goes through, above 0 to 1. At 1 an epoch keeps the very clips that
    --sampling balanced draws, and throws away all others that it read; at 0.25 it reads a quarter as much, the next
    epoch the next quarter, and rare classes are preferred only among a quarter of the clips."""
    shuffle: int = 1000
    """Clips among which a process's batches are shuffled, 0 or more. They wait in its loader workers' memory, still
    encoded: 0.1 to 0.5 MB each."""
    readers: int = 4
    """Places of the dataset that a process reads from at the same time, 1 or more; workers share them out evenly. It
    decides the order of the clips, --workers does not."""

    def __post_init__(self) -> None:
        if not 0 < self.read_share <= 1:
            raise UsageError(f"stream.read_share is {self.read_share}; choose a share above 0, up to 1")
        if self.shuffle < 0 or self.readers < 1:
            raise UsageError("stream: shuffle must be 0 or more and readers 1 or more")


def sampling_weights(manifest: Manifest) -> np.ndarray:
    """Returns each clip's weight: the sum over its classes of 1000 / (100 + count of the class), so rare ones gain.

    Returns:
        (clips,), float64. A clip on which nothing is to be heard weighs nothing and is never drawn. One whose labels
        are unknown weighs as much as the others do on average.

    The weights of PaSST's and EfficientAT's balanced sampler (Koutini et al. 2022, arXiv:2110.05069, section 4).
    """
    class_weights = 1000.0 / (100.0 + manifest.label_counts())  # (classes,)
    indptr, classes = manifest.labels_csr
    row_of_label = np.repeat(np.arange(len(manifest)), np.diff(indptr))  # (labels of all clips,)
    weights = np.bincount(row_of_label, weights=class_weights[classes], minlength=len(manifest))
    labelled = weights[weights > 0]
    weights[manifest.unlabelled] = labelled.mean() if len(labelled) else 1.0
    return weights


def seed_for(*path: int) -> int:
    """Returns the seed, 0 to 2^63 - 1, of a path such as (run's seed, step): unrelated for unequal paths."""
    # NumPy promises that SeedSequence gives the same words in all its versions.
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(weights: np.ndarray, clips: int, *, seed: int, epoch: int) -> np.ndarray:
    """Draw clips without replacement, each next one with a probability proportional to its weight among those left.

    Every clip runs a race that takes it an exponential time at its weight's rate; the first `clips` to arrive are the
    sample, in that order. This is exactly sequential weighted sampling (Efraimidis and Spirakis 2006,
    doi:10.1016/j.ipl.2005.11.003), in one vectorised pass over millions of clips.

    Args:
        weights: (clips of the dataset,), 0 or more; a clip of weight 0 is never drawn.
        clips: how many to draw; at most the number of positive weights.
        seed: the run's.
        epoch: from 0.

    Returns:
        (clips,), int64 rows, in the order of the draws.

    Raises:
        ValueError: fewer than `clips` weights are positive.
    """
    rows = np.flatnonzero(weights > 0)
    if clips > len(rows):
        raise ValueError(f"{clips} clips can't be drawn without replacement from {len(rows)} of positive weight")
    # Raw bits, because NumPy may change how it draws exponentials, but not the bits of Philox.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(len(weights))[rows]
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # strictly between 0 and 1
    arrivals = -np.log(uniform) / weights[rows]
    first = np.argpartition(arrivals, clips - 1)[:clips] if clips < len(rows) else np.arange(clips)
    return rows[first[np.argsort(arrivals[first], kind="stable")]]


def reading_order(manifest: Manifest) -> np.ndarray:
    """Number the clips by where their bytes lie, shard after shard and from each one's start to its end.

    Returns:
        (clips,), int64: the number of each row.
    """
    rows = np.lexsort((manifest.offsets, manifest.shard_of_clip))
    numbers = np.empty(len(rows), dtype=np.int64)
    numbers[rows] = np.arange(len(rows))
    return numbers


def grouped_reads(order: np.ndarray, numbers: np.ndarray, window: int) -> np.ndarray:
    """Sort rows by where they lie, within windows: none moves by `window` positions or more.

    Args:
        order: (drawn clips,), rows.
        numbers: (clips,), from `reading_order`.
        window: clips; 0 and 1 change nothing.
    """
    if window < 2:
        return order
    windows = np.arange(len(order)) // window
    return order[np.lexsort((numbers[order], windows))]


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Which clips every step of a run trains on. Steps count from 0 over all epochs; every batch is full."""

    weights: np.ndarray
    """(clips of the dataset,): how likely each clip is; equal weights are a plain shuffle."""
    batch_size: int
    """Clips a step, over all processes together."""
    clips_per_epoch: int | None = None
    """Clips drawn for one epoch; None draws every clip of positive weight once. Rounded down to whole batches."""
    seed: int = 0
    numbers: np.ndarray | None = None
    """(clips of the dataset,), from `reading_order`; needed where reads are grouped."""
    read_window: int = 0
    """Clips within which reads are sorted by offset, see `grouped_reads`; 0 leaves the order of the draws."""

    def __post_init__(self) -> None:
        if self.batch_size > self._drawn:
            raise UsageError(
                f"batch_size is {self.batch_size}, but an epoch draws only {self._drawn} clips; "
                "choose a smaller --batch-size (or check that the clips have labels: balanced sampling passes over "
                "those without, which --sampling uniform takes; those whose labels are unknown need logits, --store)"
            )
        if self.read_window and self.numbers is None:
            raise ValueError("a read window needs the clips' reading order")

    @cached_property
    def drawable(self) -> int:
        """How many clips have a positive weight."""
        return int(np.count_nonzero(self.weights > 0))

    @cached_property
    def _drawn(self) -> int:
        return self.drawable if self.clips_per_epoch is None else min(self.clips_per_epoch, self.drawable)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self._drawn // self.batch_size

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """Returns the rows of an epoch, (steps x batch,) int64, batch after batch."""
        drawn = epoch_order(self.weights, self._drawn, seed=self.seed, epoch=epoch)
        drawn = drawn[: self.steps_per_epoch * self.batch_size]
        if self.numbers is None:
            return drawn
        batches = grouped_reads(drawn, self.numbers, self.read_window).reshape(-1, self.batch_size)  # (steps, batch)
        # Within a batch the order of the draws stays: mixup pairs neighbours, which should not be a shard's neighbours.
        turn = np.empty(len(self.weights), dtype=np.int64)
        turn[drawn] = np.arange(len(drawn))
        return np.take_along_axis(batches, np.argsort(turn[batches], axis=1), axis=1).reshape(-1)

    def batch_at(self, step: int) -> np.ndarray:
        """Returns the rows, (batch,) int64, of one step."""
        return next(self.batches(step))

    def batches(self, first_step: int = 0, end_step: int | None = None) -> Iterator[np.ndarray]:
        """Go through the steps' rows from `first_step` up to but without `end_step` (None: for ever)."""
        step = first_step
        while end_step is None or step < end_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = self.order(epoch)
            for batch in range(within, self.steps_per_epoch):
                if step == end_step:
                    return
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
                step += 1


@dataclass(frozen=True, kw_only=True)
class StreamSampler(EpochSampler):
    """The same for reading whole shards one after the other.

    Every pass through the dataset visits its shards in a new order. An epoch goes through a share of a pass, lets the
    clips there run the race of `epoch_order`, and keeps the winners in the order in which they are met. That sequence
    is cut into equal pieces, one for each reader of each process, so that all have the same number of clips, however
    many shards there are and however unlike; a shard at a cut is read by two. Each reader's clips are shuffled over a
    short distance, and its process takes batches from its readers in turn.
    """

    stream: StreamConfig = field(default_factory=StreamConfig)
    shard_of_clip: np.ndarray
    """(clips of the dataset,), int: positions of shards, from 0."""
    ranks: int = 1
    """Processes that share each global batch, each taking neighbours."""

    def __post_init__(self) -> None:
        EpochSampler.__post_init__(self)
        if self.numbers is None:
            raise ValueError("streaming needs the clips' reading order")

    @cached_property
    def epochs_per_pass(self) -> int:
        """Epochs that share one pass through all shards; each keeps what it needs, so no more than that allows."""
        return max(1, min(int(1 / self.stream.read_share), self.drawable // self._drawn))

    @property
    def discarded(self) -> float:
        """Share of the clips passed in the shards that is not trained on, 0 to 1."""
        return 1 - self.steps_per_epoch * self.batch_size * self.epochs_per_pass / len(self.weights)

    def visits(self, epoch: int) -> np.ndarray:
        """Number the clips by when the epoch's pass comes to them: (clips,) int64."""
        assert self.numbers is not None
        key = np.array([seed_for(self.seed, epoch // self.epochs_per_pass, _SHARDS), 0], dtype=np.uint64)
        bits = np.random.Philox(key=key).random_raw(int(self.shard_of_clip.max()) + 1)
        turn = np.argsort(np.argsort(bits))  # (shards,), when each one's turn is
        rows = np.lexsort((self.numbers, turn[self.shard_of_clip]))
        visits = np.empty(len(rows), dtype=np.int64)
        visits[rows] = np.arange(len(rows))
        return visits

    def order(self, epoch: int) -> np.ndarray:
        """Returns the rows of an epoch, (steps x batch,) int64, batch after batch."""
        drawn = self._drawn_in_turn(epoch)
        steps, readers = self.steps_per_epoch, self.stream.readers
        reader_of_step = self.reader_of(epoch * steps + np.arange(steps))  # (steps,)
        batches = np.empty((steps, self.batch_size), dtype=np.int64)
        start = 0
        for lane, (rank, reader) in enumerate(product(range(self.ranks), range(readers))):
            positions = self.positions_of(rank)
            own = np.flatnonzero(reader_of_step == reader)  # (the reader's steps,)
            shape = len(own), positions.stop - positions.start
            clips = drawn[start : start + shape[0] * shape[1]]
            start += len(clips)
            batches[own, positions] = self._shuffled(clips, epoch, lane).reshape(shape)
        return batches.reshape(-1)

    def positions_of(self, rank: int) -> slice:
        """Returns a rank's positions in every global batch; they begin at an even one, for neighbours are mixed."""
        pairs = (self.batch_size + 1) // 2
        first, end = (min(2 * (pairs * part // self.ranks), self.batch_size) for part in (rank, rank + 1))
        return slice(first, end)

    def reader_of(self, step: IntOrArray) -> IntOrArray:
        """Returns the number of the reader, the same in every process, that a step's clips come from."""
        # Counted over all epochs, so that a reader stays with its worker from one epoch to the next.
        return step % self.stream.readers

    def _drawn_in_turn(self, epoch: int) -> np.ndarray:
        """Returns the rows that the epoch keeps, in the order in which their shards are read."""
        visits = self.visits(epoch)
        met = np.empty(len(visits), dtype=np.int64)
        met[visits] = np.arange(len(visits))  # (clips,), rows in the order of the pass
        met = met[self.weights[met] > 0]
        part, parts = epoch % self.epochs_per_pass, self.epochs_per_pass
        passed = met[len(met) * part // parts : len(met) * (part + 1) // parts]
        weights = np.zeros_like(self.weights)
        weights[passed] = self.weights[passed]
        kept = np.zeros(len(weights), dtype=bool)
        kept[epoch_order(weights, self.steps_per_epoch * self.batch_size, seed=self.seed, epoch=epoch)] = True
        return passed[kept[passed]]

    def _shuffled(self, rows: np.ndarray, epoch: int, lane: int) -> np.ndarray:
        """Shuffle rows, forwards by less than this reader's part of the shuffle."""
        key = np.array([seed_for(self.seed, epoch, _SHUFFLE, lane), 0], dtype=np.uint64)
        uniform = (np.random.Philox(key=key).random_raw(len(rows)) >> np.uint64(11)) * 2.0**-53
        return rows[np.argsort(np.arange(len(rows)) + uniform * self.stream.shuffle / self.stream.readers)]


def build_sampler(
    manifest: Manifest,
    *,
    has_logits: np.ndarray | None = None,
    sampling: Sampling,
    batch_size: int,
    clips_per_epoch: int | None = None,
    seed: int = 0,
    read_window: int = 0,
    stream: StreamConfig | None = None,
    ranks: int = 1,
) -> EpochSampler:
    """Build the sampler of a run on a dataset.

    Args:
        manifest: the dataset.
        has_logits: (clips,) bool; None where there is no store. A clip with neither a known label nor logits is never
            drawn, for nothing can be learned from it.
        sampling: the kind of sampler and of weights.
        batch_size: clips a step, over all ranks.
        clips_per_epoch: see `EpochSampler`.
        seed: the run's.
        read_window: see `EpochSampler`; streaming has no use for it.
        stream: the settings of streaming.
        ranks: processes that share each batch.

    Raises:
        UsageError: an epoch would be shorter than a batch.
    """
    stream = stream or StreamConfig()
    balanced = (stream.weights if sampling == "stream" else sampling) == "balanced"
    weights = sampling_weights(manifest) if balanced else np.ones(len(manifest))
    weights[manifest.unlabelled if has_logits is None else manifest.unlabelled & ~has_logits] = 0
    if sampling == "stream":
        return StreamSampler(
            weights=weights,
            batch_size=batch_size,
            clips_per_epoch=clips_per_epoch,
            seed=seed,
            numbers=reading_order(manifest),
            stream=stream,
            shard_of_clip=manifest.shard_of_clip,
            ranks=ranks,
        )
    return EpochSampler(
        weights=weights,
        batch_size=batch_size,
        clips_per_epoch=clips_per_epoch,
        seed=seed,
        numbers=reading_order(manifest) if read_window else None,
        read_window=read_window,
    )
