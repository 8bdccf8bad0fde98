"""`pipeline ingest folder`: a folder of sounds for each class → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.class_folders import ClassFoldersSource
from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.sources import local_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestFolderConfig(IngestConfig):
    """Which folder, and what dataset it becomes."""

    audio: str
    """The folder that holds a folder for each class; the sounds are in those, in any depth."""
    whole_names: bool = False
    """Take a sound's path without its extension as its id, even where its name looks like YouTube's id behind a Y or
    with times after it."""
    unlabelled: bool = False
    """Take all sounds, in any folder or none, as clips whose labels are unknown: teachers can label them, and a model
    learns them from the logits alone. Needs --classes, or a dataset to --add them to."""


def run(config: Annotated[IngestFolderConfig, Parameter(name="*")]) -> IngestResult:
    """Turn a folder of sounds for each class into a dataset: WebDataset shards and a manifest.

    The classes are the folders' names in alphabetical order, unless --classes or the dataset that is added to says
    otherwise. The encoded bytes are kept as they are. Every file is decoded once to see that it can be; the ones that
    can't are listed in the dataset's rejected.parquet.

    Raises:
        ManifestError: no clip could be used.
        UsageError: the folder is not there, the dataset is, or its folder holds tars of somebody else.
    """
    folder = local_folder(config.audio, "--audio")
    numbered = config.classes is not None
    return ingest(config, ClassFoldersSource(folder, config.whole_names, numbered, config.unlabelled))
