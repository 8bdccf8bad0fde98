"""`pipeline ingest passt`: the HDF5 files of PaSST and EfficientAT → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.passt_hdf5 import PasstHdf5Source


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestPasstConfig(IngestConfig):
    """Which files, and what dataset they become."""

    hdf5: tuple[str, ...]
    """The files, such as balanced_train_segments_mp3.hdf, or folders of them; of a clip in several, the first is
    taken."""


def run(config: Annotated[IngestPasstConfig, Parameter(name="*")]) -> IngestResult:
    """Turn the HDF5 files that PaSST and EfficientAT train from into a dataset: WebDataset shards and a manifest.

    The MP3 bytes are kept as they are. Every clip is decoded once to see that it can be; the ones that can't are listed
    in the dataset's rejected.parquet.

    Raises:
        ManifestError: a file is not what it should be, or no clip could be used.
        UsageError: a file is not there, the dataset is, or its folder holds tars of somebody else.
    """
    return ingest(config, PasstHdf5Source(config.hdf5))
