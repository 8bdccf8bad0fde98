"""`pipeline merge`: several datasets → one."""

import logging
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import UsageError
from pipeline.ingest.copying import CopyConfig, copy
from pipeline.ingest.finished_datasets import joined_vocabulary
from pipeline.ingest.ingesting import IngestResult
from pipeline.storage.files import is_same_place

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """Which datasets, and what they become."""

    datasets: tuple[str, ...]
    """The dataset folders, paths or URLs. Of a clip in several, the first one's is taken."""
    _: KW_ONLY
    out: str
    """The dataset folder to make: a path or a URL."""
    classes: str | None = None
    """The class list of the result, in the format of AudioSet's class_labels_indices.csv: labels are looked up there by
    mid, else by name, and clips with others are left out. Unless given: the first dataset's list, and behind it what
    the others add."""
    copies: Annotated[CopyConfig, Parameter(name="*")] = field(default_factory=CopyConfig)

    def __post_init__(self) -> None:
        self.copies.of(self.out)
        if not self.datasets:
            raise UsageError("give the datasets to merge")
        if any(is_same_place(dataset, self.out) for dataset in self.datasets):
            raise UsageError(f"--out {self.out}: is one of the datasets. Choose another folder")


def run(config: Annotated[MergeConfig, Parameter(name="*")]) -> IngestResult:
    """Join datasets into one.

    Sounds are copied byte for byte, without decoding, and compared with the manifests' checksums on the way; so are
    the jsons beside them, where their labels need no new spelling. What is left out, such as the later copies of a
    clip in several datasets, is listed in the dataset's rejected.parquet. Logit stores of the first dataset cover its
    clips in the result as long as the class list stays the same.

    Raises:
        ManifestError: a dataset is damaged.
        ShardError: a shard is missing.
        UsageError: the dataset at --out is there already, or the class lists contradict each other.
    """
    vocabularies = [(dataset, read_manifest(dataset).vocabulary) for dataset in config.datasets]
    vocabulary = read_vocabulary(config.classes) if config.classes else joined_vocabulary(vocabularies)
    for dataset, own in vocabularies:
        if own.sha256 != vocabulary.sha256:
            _tell_of_new_classes(dataset, own, vocabulary)
    return copy(config.copies.of(config.out), config.datasets, vocabulary)


def _tell_of_new_classes(dataset: str, old: Vocabulary, new: Vocabulary) -> None:
    _log.warning(
        "%s: its %d classes become %d others; logit stores that were made for it do not fit the merged dataset",
        dataset,
        len(old),
        len(new),
    )
