"""`pipeline import-logits`: logits that another program made → a logit store of a dataset's clips."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import ForeignLogitsError, TooManyFailuresError, UsageError
from pipeline.logits.filling import check_claim, check_part_names, claim_store, finished_shards
from pipeline.logits.imports.ced import CedLogits, file_pairs
from pipeline.logits.imports.clip_logits import open_clip_logits, write_parts
from pipeline.logits.imports.efficientat import EfficientAtLogits
from pipeline.logits.imports.foreign_logits import ForeignLogits, Held
from pipeline.logits.imports.import_stamp import import_stamp
from pipeline.logits.imports.matching import ClipRows, match_rows, renumber
from pipeline.logits.imports.parquet_lists import ParquetLogits
from pipeline.logits.store import FAILED_NAME, LogitPart, finished_parts, write_failures
from pipeline.scoring.label_fit import check_fit
from pipeline.storage import files as storage
from pipeline.storage.one_writer import one_writer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportLogitsConfig:
    """Which files, of which dataset's clips. Give --npy with --index, or --hdf5, or --parquet."""

    data: str
    """Dataset that the logits are of: a folder or URL with a manifest. Clips are found by id."""
    store: str
    """Logit store to write or to go on with: a folder or URL."""
    npy: str | None = None
    """EfficientAT's array of logits, one row a clip, on this machine."""
    index: str | None = None
    """EfficientAT's fname_to_index.pkl, which says what row is which clip; it is read without unpickling it."""
    hdf5: tuple[str, ...] = ()
    """CED's files logits_ep….h5, each beside its .parquet, or a folder of them; several epochs are averaged."""
    parquet: tuple[str, ...] = ()
    """Any Parquet files with a column of ids and one of lists of numbers; paths or URLs."""
    id_column: str = "clip_id"
    """With --parquet: the column of clip ids or file names."""
    values_column: str = "logits"
    """With --parquet: the column of lists, a number for each class."""
    held: Held | None = None
    """What the numbers in the files are, before the sigmoid or after it. Known of EfficientAT's files (logits) and of
    CED's (probabilities); has to be given for --parquet."""
    classes: str | None = None
    """Class list that numbers the files' classes, in the format of AudioSet's class_labels_indices.csv; by default they
    are the dataset's, in its order."""
    origin: str = ""
    """Who made the logits and with what, in your words; kept in the store's stamp."""
    allow_misfit: bool = False
    """Import even if the logits do not fit the labels of their clips, or there are too few labels to tell."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the dataset's clips whose numbers may be unusable: not finite in half precision."""
    overwrite: bool = False
    """Replace a store that was made otherwise."""

    def __post_init__(self) -> None:
        given = [flag for flag in ("npy", "hdf5", "parquet") if getattr(self, flag)]
        if len(given) != 1:
            told = f"--{' and --'.join(given)} are given" if given else "no logits are given"
            raise UsageError(f"{told}; give --npy with --index, or --hdf5, or --parquet")
        if (self.npy is None) != (self.index is None):
            raise UsageError("--npy and --index belong together; give both, of the same release")
        if self.parquet and self.held is None:
            raise UsageError("say by --held logits or --held probabilities what the numbers in the Parquet are")
        if storage.is_same_place(self.data, self.store):
            raise UsageError(f"data and store are both {self.data}; give the store a folder of its own")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")


def run(config: Annotated[ImportLogitsConfig, Parameter(name="*")]) -> None:
    """Turn logits that another program made into a store: EfficientAT's .npy, CED's HDF5 files, or any Parquet.

    Clips are found by id, whatever the order of the files; a dataset's clip that they don't have learns from its labels
    alone. The stamp tells what files they were, by SHA-256. Before anything is written, the mAP on the clips' own
    labels is compared with that on the same labels dealt out at random; where it isn't far above, the files are not of
    these clips, and are refused. The same command again does only the shards whose part is missing.

    Raises:
        ForeignLogitsError: a file is damaged, two contradict each other, or they don't fit the dataset's labels.
        UsageError: the files and the dataset, or the flags, don't go together.
        TooManyFailuresError: more clips' numbers are unusable than `max_failed` allows; the store has the others.
    """
    manifest = read_manifest(config.data)
    check_part_names(manifest)
    own = manifest.vocabulary if config.classes is None else read_vocabulary(config.classes)
    source = _open_source(config, own)
    numbers = _numbers(config, source, own, manifest.vocabulary)
    stamp = import_stamp(source, own, numbers, manifest, origin=config.origin)
    check_claim(config.store, stamp, overwrite=config.overwrite)

    found = match_rows(source.names(), manifest.clip_ids, averaged=source.averaged)
    if not len(found.order):
        raise ForeignLogitsError(
            f"{source.files[0]}: of its {len(found.clip_of_row)} rows none is of a clip of {manifest.location}. "
            "Compare its names with the dataset's clip ids"
        )
    with one_writer(config.store):
        finished = finished_shards(config.store, stamp, manifest)
        shards = [shard for shard in manifest.shards if shard not in finished]
        with open_clip_logits(source, found, numbers, manifest, shards) as clips:
            if shards and not finished:  # what was begun was checked then, and the stamp says they are the same files
                check_fit(clips, allow_misfit=config.allow_misfit)
            claim_store(config.store, stamp, overwrite=config.overwrite)
            write_parts(config.store, stamp, clips, shards)
        write_failures(config.store, list(finished_parts(config.store, stamp).values()))
        storage.write_listing(config.store)
    parts = list(finished_shards(config.store, stamp, manifest).values())
    _conclude(config, manifest, found, parts)


def _open_source(config: ImportLogitsConfig, own: Vocabulary) -> ForeignLogits:
    if config.npy is not None and config.index is not None:
        return EfficientAtLogits(config.npy, config.index, config.held or "logits")
    if config.hdf5:
        return CedLogits(file_pairs(config.hdf5), config.held or "probabilities", len(own))
    return ParquetLogits(config.parquet, config.id_column, config.values_column, config.held or "logits")


def _numbers(
    config: ImportLogitsConfig, source: ForeignLogits, own: Vocabulary, wanted: Vocabulary
) -> np.ndarray | None:
    """Returns the number in the files of each of the dataset's classes; None where they are the same."""
    if source.classes != len(own):
        list_of = config.classes or f"{config.data}, whose class list counts unless --classes names another,"
        raise UsageError(f"{source.files[0]}: has {source.classes} numbers a row, but {list_of} has {len(own)} classes")
    numbers = renumber(own, wanted, config.classes or "")
    same = len(own) == len(wanted) and bool((numbers == np.arange(len(wanted))).all())
    return None if same else numbers


def _conclude(config: ImportLogitsConfig, manifest: Manifest, found: ClipRows, parts: Sequence[LogitPart]) -> None:
    clips, imported = len(manifest), sum(part.clips for part in parts)
    failed = sum(len(part.failures) for part in parts)
    _log.info(
        "%s: logits of %d of %d clips; %d are not in the files; %d have numbers that are not finite",
        config.store,
        imported,
        clips,
        clips - imported - failed,
        failed,
    )
    if others := int((found.clip_of_row < 0).sum()):
        _log.info("%d of %d rows are of no clip of %s", others, len(found.clip_of_row), config.data)
    if found.repeated:
        _log.warning("%d rows are of clips that earlier rows are of; the first row counts", found.repeated)
    if failed > config.max_failed * clips:
        raise TooManyFailuresError(
            f"{failed} of {clips} clips of {config.data} have numbers that are not finite ({100 * failed / clips:.1f} "
            f"%, limit {100 * config.max_failed:g} %); {storage.join_path(config.store, FAILED_NAME)} names them. Get "
            "the files anew, or allow more with --max-failed."
        )
