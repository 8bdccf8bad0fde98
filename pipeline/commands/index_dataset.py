"""`pipeline index`: a manifest for WebDataset tars that somebody else made."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.dataset.manifest import CLASSES_NAME
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary, read_vocabulary
from pipeline.errors import UsageError
from pipeline.ingest.dataset_folder import UNFINISHED, finish_folder
from pipeline.ingest.rejections import count_by_reason, rejection_table, tabulate
from pipeline.ingest.tars import TarRules, index_tars, is_named_list, is_tar
from pipeline.runtime.output import print_line, print_table
from pipeline.runtime.progress import progress_bar
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """Which tars, and how their members become clips."""

    dataset: str
    """The folder of tars, a path or a URL; the manifest is written into it."""
    _: KW_ONLY
    classes: str | None = None
    """The class list that the labels point into, in the format of AudioSet's class_labels_indices.csv; the folder's own
    classes.csv, or else AudioSet's, unless given."""
    checksums: bool = True
    """Read the audio to note its checksum, so that later readers notice changed bytes."""
    keep_unlabelled: bool = False
    """Take clips whose labels nobody knows, too: their json is missing or has no field of labels. Teachers can label
    them, and a model learns them from the logits alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexResult:
    """What an index found."""

    clips: int
    shards: int
    rejected: dict[str, int]
    """Reason → how many members or clips were left out."""


def run(config: Annotated[IndexConfig, Parameter(name="*")]) -> IndexResult:
    """Write the manifest of a folder of WebDataset tars, made by anyone.

    No audio is decoded, and the tars are not touched. A clip's id is its json's `clip_id`, `id`, `ytid` or `video_id`,
    else the name of its members; its labels are its json's `labels`, `mids`, `label`, `human_labels` or `label_id`:
    class ids or names, a vector of zeros and ones for all classes, or, with --classes, numbers of that list. What can't
    be used is listed in the folder's rejected.parquet.

    Raises:
        ManifestError: no clip could be used.
        UsageError: there are no tars, or an ingest into the folder has not finished.
    """
    storage.check_writable(config.dataset)
    if storage.exists(storage.join_path(config.dataset, UNFINISHED)):
        raise UsageError(
            f"{config.dataset}: an ingest was stopped here. Run its command again, or remove {UNFINISHED} to index "
            "the shards that it finished"
        )
    shards = [file.name for file in storage.list_files(config.dataset) if is_tar(file.name)]
    if not shards:
        raise UsageError(f"{config.dataset}: holds no tars")
    vocabulary, is_named = _vocabulary(config)
    rules = TarRules(
        vocabulary=vocabulary,
        checksums=config.checksums,
        keep_unlabelled=config.keep_unlabelled,
        numbered=is_named,
    )
    with progress_bar("index", len(shards), unit="shards") as bar:
        ledger = index_tars(config.dataset, shards, rules, on_shard=bar.advance)
    manifest = finish_folder(config.dataset, [ledger], [], vocabulary)
    rejected = count_by_reason(tabulate(ledger.rejections))
    if rejected:
        print_table(rejection_table(rejected))
    result = IndexResult(clips=len(manifest), shards=len(manifest.shards), rejected=rejected)
    print_line(f"{config.dataset}: {result.clips:,} clips; shards: {result.shards:,}")
    return result


def _vocabulary(config: IndexConfig) -> tuple[Vocabulary, bool]:
    """Returns the classes, and whether somebody named their list."""
    beside = storage.join_path(config.dataset, CLASSES_NAME)
    if config.classes is not None:
        return read_vocabulary(config.classes), True
    found = read_vocabulary(beside) if storage.exists(beside) else audioset_vocabulary()
    return found, is_named_list(found)
