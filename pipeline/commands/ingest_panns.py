"""`pipeline ingest panns`: the HDF5 files of PANNs → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.panns_hdf5 import PannsHdf5Source


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestPannsConfig(IngestConfig):
    """Which files, and what dataset they become."""

    hdf5: tuple[str, ...]
    """The files, such as waveforms/balanced_train.h5, or folders of them; of a clip in several, the first is taken."""


def run(config: Annotated[IngestPannsConfig, Parameter(name="*")]) -> IngestResult:
    """Turn the HDF5 files of waveforms that PANNs trains from into a dataset: WebDataset shards and a manifest.

    The waveforms become FLAC files, which lose nothing of their 16 bits. Rows without a name stand for clips that were
    not there; they are counted, and listed in the dataset's rejected.parquet.

    Raises:
        ManifestError: a file is not what it should be, or no clip could be used.
        UsageError: a file is not there, the dataset is, or its folder holds tars of somebody else.
    """
    return ingest(config, PannsHdf5Source(config.hdf5))
