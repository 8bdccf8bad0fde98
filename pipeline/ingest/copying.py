"""What the commands share that make datasets of datasets: split, merge, reshard."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.ingest.finished_datasets import Choice, FinishedDatasets
from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyConfig:
    """How copies are cut and made."""

    name: str | None = None
    """What the shards are called before their number; the name of the dataset folder unless given."""
    clips_per_shard: int = 1000
    """Clips in one shard, at least 1."""
    workers: int | None = None
    """Clips read at the same time, at least 1; one for each core that may be used, unless given."""
    address: str | None = None
    """Of a Ray cluster that makes the shards: HOST:PORT, or auto where this machine belongs to one. Its machines have
    to see all the datasets under the same paths; --workers is then how many shards are made at the same time."""
    overwrite: bool = False
    """Replace a dataset that is there."""

    def of(self, out: str) -> IngestConfig:
        """Returns the settings of the copy at `out`; raises UsageError where one is out of range."""
        return IngestConfig(
            out=out,
            name=self.name,
            clips_per_shard=self.clips_per_shard,
            workers=self.workers,
            address=self.address,
            overwrite=self.overwrite,
        )


def copy(
    config: IngestConfig, datasets: Sequence[str], vocabulary: Vocabulary, choice: Choice | None = None
) -> IngestResult:
    """Make a dataset of clips of finished ones; their bytes, ids, labels and known facts stay.

    Raises:
        ManifestError: a dataset is damaged, or no clip is chosen.
        ShardError: a shard is missing.
        UsageError: `config.out` is there already.
    """
    return ingest(config, FinishedDatasets(tuple(datasets), vocabulary, choice))
