"""`pipeline ingest audioset`: AudioSet's segment lists and audio files → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.ingest.audioset import AudiosetSource
from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.sources import local_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestAudiosetConfig(IngestConfig):
    """Which clips, where their files are, and what dataset they become."""

    segments: tuple[str, ...]
    """AudioSet's segment lists, such as balanced_train_segments.csv; several become one dataset."""
    audio: str
    """The folder with the audio files, in any depth, called ID.EXT, YID.EXT, ID_START.EXT or ID_START_END.EXT."""

    def __post_init__(self) -> None:
        IngestConfig.__post_init__(self)
        if not self.segments:
            raise UsageError("--segments needs at least one file")


def run(config: Annotated[IngestAudiosetConfig, Parameter(name="*")]) -> IngestResult:
    """Turn AudioSet's segment lists and audio files into a dataset: WebDataset shards and a manifest.

    The encoded bytes are kept as they are. Every file is decoded once to see that it can be; the ones that can't, and
    those that are missing, are listed in the dataset's rejected.parquet. The same input gives the same bytes. A stopped
    run leaves no manifest, and the same command goes on where it stopped.

    Raises:
        ManifestError: a list is malformed, or no clip could be used.
        UsageError: the dataset is there already, or the folder holds tars of somebody else.
    """
    return ingest(config, AudiosetSource(config.segments, local_folder(config.audio, "--audio")))
