"""`pipeline ingest webdataset`: tars of any layout → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.webdataset import WebdatasetSource


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestWebdatasetConfig(IngestConfig):
    """Which tars, where their labels are, and what dataset they become."""

    tars: tuple[str, ...]
    """The tars, or folders of them; paths or URLs. Of a clip in several, the first is taken."""
    segments: tuple[str, ...] = ()
    """AudioSet's segment lists, for tars of nothing but sounds called by their ids: the lists give the labels, and only
    the clips that they name are taken."""
    keep_unlabelled: bool = False
    """Take clips whose labels nobody knows, too: their json is missing or has no field of labels. Teachers can label
    them, and a model learns them from the logits alone."""


def run(config: Annotated[IngestWebdatasetConfig, Parameter(name="*")]) -> IngestResult:
    """Pack the clips of anybody's tars anew into a dataset: WebDataset shards and a manifest.

    `pipeline index` uses WebDataset tars where they are; this command copies, for shards of another size, several
    collections in one dataset, another encoding, or every clip decoded once to see that it can be. A clip's id is its
    json's `clip_id`, `id`, `ytid` or `video_id`, else the name of its members; its labels are its json's `labels`,
    `mids`, `label`, `human_labels` or `label_id`: class ids or names, a vector of zeros and ones for all classes, or,
    with --classes, numbers of that list. What can't be used is listed in the dataset's rejected.parquet.

    Raises:
        ManifestError: a list is malformed, or no clip could be used.
        UsageError: a tar is not there, the dataset is, or its folder holds tars of somebody else.
    """
    numbered = config.classes is not None
    return ingest(config, WebdatasetSource(config.tars, config.segments, config.keep_unlabelled, numbered))
