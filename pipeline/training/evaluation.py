"""A model in training, evaluated on a dataset by all ranks together, to the same metrics as by one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.batches.join import MAX_SCORED, FailureTally, JoinedDataset, PaddedClips, TrainingBatch, load_batches
from pipeline.batches.reading import FailedClip
from pipeline.decoding.pool import DecodingPool
from pipeline.errors import LostProcessError, TooManyFailuresError
from pipeline.models.device import Precision
from pipeline.runtime.stopping import StopRequest, StopRequestedError
from pipeline.scoring.predictions import predict
from pipeline.training.ranks import Ranks

Score = Callable[[np.ndarray, np.ndarray, np.ndarray | None], dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Evaluates a model on a dataset.

    Every clip is scored once. Ranks take whole batches in turn, and the batches are the same for any number of ranks:
    a clip's logits can depend, in their last bits, on the batch that it is computed in.
    """

    dataset: JoinedDataset
    score: Score
    """(logits, labels, label_mask), all (clips, classes) → the metrics; see `Learner.score`."""
    batch_size: int
    """Clips in a batch; more than 64 are not taken at once."""
    device: torch.device
    precision: Precision
    max_failed: float
    """Largest share, 0 to 1, of the clips that may be unreadable."""
    ranks: Ranks

    def load(self, pool: DecodingPool) -> Iterator[TrainingBatch]:
        """Returns this rank's batches; the first ones are decoded from now on."""
        return load_batches(
            self.dataset.reader,
            self._batches()[self.ranks.rank :: self.ranks.world_size],
            pool=pool,
            device=self.device,
        )

    def run(self, model: nn.Module, stop: StopRequest, loaded: Iterator[TrainingBatch]) -> dict[str, float]:
        """Returns the metrics of `score`, and `clips`, how many were scored: the same on every rank.

        Args:
            model: on the device.
            stop: asks for an end.
            loaded: what `load` has returned.

        Raises:
            LostProcessError: a decoding process of one of the ranks died or does not answer.
            StopRequestedError: somebody asked one of the ranks to end.
            TooManyFailuresError: too many clips can't be read, or none can.
        """
        failures: list[FailedClip] = []
        clips = self._in_step(loaded, stop, failures)
        found = predict([model], clips, device=self.device, precision=self.precision)
        manifest = self.dataset.manifest
        tally = FailureTally(manifest, max_share=self.max_failed)
        tally.count(np.arange(len(manifest)), [one for some in self.ranks.all_gather(failures) for one in some])
        tally.check()
        if len(tally.failures) == len(manifest):  # a limit of 100 % allows it
            raise TooManyFailuresError(f"{manifest.location}: {tally.summary()}, so nothing is left to evaluate on")
        parts = self.ranks.all_gather((found.rows, found.logits))
        return self.ranks.broadcast(lambda: self._score(parts))

    def _score(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        rows = np.concatenate([rows for rows, _ in parts])
        logits = np.concatenate([logits[0] for rows, logits in parts if len(rows)])  # (clips, classes)
        order = np.argsort(rows)
        labels = self.dataset.manifest.label_matrix(rows[order])  # (clips, classes)
        label_mask = self.dataset.manifest.label_mask(rows[order])
        return {**self.score(logits[order], labels, label_mask), "clips": float(len(rows))}

    def _batches(self) -> list[np.ndarray]:
        """Returns the rows of each batch of all ranks."""
        clips = len(self.dataset.manifest)
        return np.array_split(np.arange(clips), math.ceil(clips / min(self.batch_size, MAX_SCORED)))

    def _in_step(
        self, loaded: Iterator[TrainingBatch], stop: StopRequest, failures: list[FailedClip]
    ) -> Iterator[PaddedClips]:
        """Yields this rank's clips; asks all ranks before each batch whether to go on."""
        ranks = self.ranks
        for _ in range(math.ceil(len(self._batches()) / ranks.world_size)):  # in the last round some may be idle
            batch, problem = None, StopRequestedError() if stop.requested else None
            if problem is None:
                try:
                    batch = next(loaded, None)
                except (StopRequestedError, LostProcessError) as error:
                    problem = error
            ranks.go_on_together(problem)
            if batch is not None:
                failures.extend(batch.failures)
                yield from batch.divided(self.dataset.reader.sample_rate_hz)
