"""`pipeline ingest huggingface`: Parquet files of the Hugging Face Hub → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.hugging_face import HuggingFaceSource
from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestHuggingfaceConfig(IngestConfig):
    """Which files, and what dataset they become."""

    parquet: tuple[str, ...]
    """The files, or folders of them, such as AudioSet/data/bal_train; paths or URLs. Of a clip in several, the first is
    taken."""
    id_column: str | None = None
    """The column of clip ids, taken as they are. Unless given: clip_id, id, ytid or video_id; where there is none, the
    name of the sound if it is a YouTube id, else the file with that name or with the number of the row."""


def run(config: Annotated[IngestHuggingfaceConfig, Parameter(name="*")]) -> IngestResult:
    """Turn Parquet files of the Hugging Face Hub into a dataset: WebDataset shards and a manifest.

    Made for agkphysics/AudioSet (columns video_id, audio, labels, human_labels). Numbers in a column of labels mean the
    names that the file has for them (ClassLabel), which are the dataset's classes then, or those of --classes. The
    encoded bytes are kept as they are. Every clip is decoded once to see that it can be; the ones that can't are listed
    in the dataset's rejected.parquet.

    Raises:
        ManifestError: a file is not what it should be, or no clip could be used.
        UsageError: a file or its column of ids is not there, its labels are numbers of no list, the dataset is there
            already, or its folder holds tars of somebody else.
    """
    return ingest(config, HuggingFaceSource(config.parquet, config.id_column, config.classes is not None))
