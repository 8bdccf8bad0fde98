"""`pipeline reshard`: a dataset in shards of another size."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.ingest.copying import CopyConfig, copy
from pipeline.ingest.ingesting import IngestResult
from pipeline.storage.files import is_same_place


@dataclass(frozen=True, slots=True)
class ReshardConfig:
    """Which dataset, and how large its shards are to be."""

    dataset: str
    """The dataset folder, a path or a URL."""
    _: KW_ONLY
    out: str
    """The dataset folder to make: a path or a URL."""
    copies: Annotated[CopyConfig, Parameter(name="*")] = field(default_factory=CopyConfig)

    def __post_init__(self) -> None:
        self.copies.of(self.out)
        if is_same_place(self.dataset, self.out):
            raise UsageError(f"--out {self.out}: is the dataset itself. Choose another folder")


def run(config: Annotated[ReshardConfig, Parameter(name="*")]) -> IngestResult:
    """Copy a dataset into shards of another size.

    Sounds and the jsons beside them are copied byte for byte, without decoding; each clip is compared with the
    manifest's checksum on the way. Ids, labels and order stay, so a logit store of the old dataset is one of the new.

    Raises:
        ManifestError: the dataset is damaged.
        ShardError: a shard is missing.
        UsageError: the dataset at --out is there already.
    """
    return copy(config.copies.of(config.out), [config.dataset], read_manifest(config.dataset).vocabulary)
