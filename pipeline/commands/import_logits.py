"""`pipeline import-logits`: logits that another program made → a logit store of a dataset's clips."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import ForeignLogitsError, TooManyFailuresError, UsageError
from pipeline.logits.filling import check_claim, check_part_names, claim_store, finished_shards
from pipeline.logits.imports.ced import CedLogits, file_pairs
from pipeline.logits.imports.efficientat import EfficientAtLogits
from pipeline.logits.imports.foreign_logits import (
    LEAST_PROBABILITY,
    ForeignLogits,
    Held,
    RowReader,
    to_logits,
    to_probabilities,
)
from pipeline.logits.imports.matching import ClipRows, match_rows, renumber
from pipeline.logits.imports.parquet_lists import ParquetLogits
from pipeline.logits.stamp import ImportStamp, SourceFile, StoreStamp
from pipeline.logits.store import (
    FAILED_NAME,
    ClipFailure,
    LogitPart,
    finished_parts,
    part_stem,
    publish_part,
    write_failures,
)
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.scoring.label_fit import MAX_CLIPS, LabelFit, measure_fit, offsets, stretches
from pipeline.storage import files as storage

_log = logging.getLogger(__name__)

_BYTES_AT_ONCE = 1 << 22


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
    CED's (probabilities); has to be said of --parquet."""
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
        if self.data.rstrip("/") == self.store.rstrip("/"):
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
    stamp = _stamp(config, source, own, numbers, manifest)
    check_claim(config.store, stamp, overwrite=config.overwrite)

    found = match_rows(source.names(), manifest.clip_ids, averaged=source.averaged)
    if not len(found.order):
        raise ForeignLogitsError(
            f"{source.files[0]}: of its {len(found.clip_of_row)} rows none is of a clip of {manifest.location}. "
            "Compare its names with the dataset's clip ids"
        )
    finished = finished_shards(config.store, stamp, manifest)
    shards = [shard for shard in manifest.shards if shard not in finished]
    with _opened(source, found, numbers, manifest, shards) as clips:
        if shards and not finished:  # what was begun was checked then, and the stamp knows that it is the same files
            _check_fit(config, clips)
        claim_store(config.store, stamp, overwrite=config.overwrite)
        _write_parts(config.store, stamp, clips, shards)
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


def _stamp(
    config: ImportLogitsConfig, source: ForeignLogits, own: Vocabulary, numbers: np.ndarray | None, manifest: Manifest
) -> StoreStamp:
    classes = len(manifest.vocabulary)
    done = [source.conversion]
    if source.held == "probabilities":
        done.append(f"logit of probabilities held within {LEAST_PROBABILITY:g} and 1 - {LEAST_PROBABILITY:g}")
    if numbers is not None:
        done.append(f"{classes} of {len(own)} classes, renumbered from the list with sha256 {own.sha256}")
    return StoreStamp(
        teachers=(),
        vocabulary_sha256=manifest.vocabulary.sha256,
        classes=classes,
        precision="unknown",
        top_k=source.top_k if source.top_k is not None and source.top_k < classes else None,
        imported=ImportStamp(
            layout=source.layout,
            files=_hash_files(source.files),
            origin=config.origin,
            held=source.held,
            conversion="; ".join(filter(None, done)),
        ),
    )


def _hash_files(locations: Sequence[str]) -> tuple[SourceFile, ...]:
    hashed = []
    with progress_bar("hashing", None, unit="MB") as bar:
        for location in locations:
            digest, size = hashlib.sha256(), 0
            with storage.open_input(location) as stream:
                while block := stream.read(_BYTES_AT_ONCE):
                    digest.update(block)
                    size += len(block)
                    bar.advance(len(block) // 1_000_000)
            hashed.append(SourceFile(name=storage.file_name(location), size=size, sha256=digest.hexdigest()))
    return tuple(hashed)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Clips:
    """Foreign logits by the clips of a dataset, open for reading in any order and from several threads."""

    manifest: Manifest
    source: ForeignLogits
    found: ClipRows
    numbers: np.ndarray | None
    """(classes,): which number of a row is which of the dataset's classes."""
    read: RowReader
    wanted: np.ndarray
    """The clips that are open, ascending."""

    def logits(self, clips: np.ndarray) -> np.ndarray:
        """Returns the logits of clips that have rows: (clips, classes), float16; infinite where too large."""
        starts = self.found.bounds[clips]
        counts = self.found.bounds[clips + 1] - starts  # (clips,), 1 or more
        if counts.max(initial=1) == 1:
            logits = self.read(self.found.order[starts])
        else:
            total = np.zeros((len(clips), self.source.classes))
            for view in range(counts.max()):
                seen = counts > view
                total[seen] += to_probabilities(self.read(self.found.order[starts[seen] + view]))
            logits = to_logits(total / counts[:, None], "probabilities", self.source.files[0])
        with np.errstate(over="ignore"):
            return (logits if self.numbers is None else logits[:, self.numbers]).astype(np.float16)


@contextmanager
def _opened(
    source: ForeignLogits, found: ClipRows, numbers: np.ndarray | None, manifest: Manifest, shards: Sequence[str]
) -> Iterator[_Clips]:
    """Open the rows of some shards' clips."""
    of_shards = np.concatenate([np.zeros(0, np.int64), *(manifest.rows_of_shard(shard) for shard in shards)])
    wanted = np.sort(found.with_rows(of_shards))
    has = np.zeros(len(manifest) + 1, bool)
    has[wanted] = True
    rows = np.sort(found.order[has[found.clip_of_row[found.order]]])
    with progress_bar("laying out", len(rows), unit="rows") as bar, source.open_rows(rows, bar.advance) as read:
        yield _Clips(manifest=manifest, source=source, found=found, numbers=numbers, read=read, wanted=wanted)


def _check_fit(config: ImportLogitsConfig, clips: _Clips) -> None:
    """Refuse logits that are not of their clips, or are no logits.

    Raises:
        ForeignLogitsError: they are not, unless a misfit is allowed.
    """
    bounds, _ = clips.manifest.labels_csr
    labelled = clips.wanted[bounds[clips.wanted + 1] > bounds[clips.wanted]]
    sample = np.random.default_rng(0).permutation(labelled)[:MAX_CLIPS]
    sample = sample[np.argsort(_first_rows(clips, sample))]
    faults = [] if len(sample) else [f"none of their {len(clips.wanted)} clips has a label to check them by"]
    for piece in stretches(sample) if len(sample) else ():
        fit = _fit(config, clips, piece)
        if fit is None:
            faults.append(f"none of {len(piece)} clips has finite numbers")
            continue
        told = _told(fit)
        _log.info("%s", told)
        if not fit.fits:
            faults.append(told)
    if not faults:
        return
    complaint = f"{', '.join(clips.source.files[:2])}: the logits do not fit the labels of {config.data}: {faults[0]}"
    if config.allow_misfit:
        _log.warning("%s; imported all the same", complaint)
        return
    raise ForeignLogitsError(
        f"{complaint}. Their rows are not of the clips that they are named for, or the classes are in another order: "
        "get all files anew, of one release, or name the classes by --classes. --allow-misfit imports them all the same"
    )


def _first_rows(clips: _Clips, chosen: np.ndarray) -> np.ndarray:
    return clips.found.order[clips.found.bounds[chosen]]


def _fit(config: ImportLogitsConfig, clips: _Clips, piece: np.ndarray) -> LabelFit | None:
    logits = clips.logits(piece).astype(np.float32)
    finite = np.isfinite(logits).all(axis=1)
    logits, piece = logits[finite], piece[finite]
    if not len(piece):
        return None
    if clips.source.held == "logits" and logits.min() >= 0 and logits.max() <= 1:
        raise ForeignLogitsError(
            f"{clips.source.files[0]}: all numbers of {len(piece)} clips are within 0 and 1, so they are no logits. "
            "Say --held probabilities"
        )
    rows = _first_rows(clips, piece)
    label = clips.manifest.label_matrix
    near = {offset: (who, label(their)) for offset, (who, their) in offsets(rows, clips.found.clip_of_row).items()}
    return measure_fit(logits, rows, label(piece), near)


def _told(fit: LabelFit) -> str:
    moved = ""
    if fit.offset is not None:
        moved = f"; the labels of the clip {abs(fit.offset)} rows {'on' if fit.offset > 0 else 'back'} fit better"
    return (
        f"mAP {fit.mean_average_precision:.4f} on {fit.clips:,} clips of the rows {fit.first_row:,} to "
        f"{fit.last_row:,}, and {fit.dealt_mean:.4f} ± {fit.dealt_deviation:.4f} with their labels dealt out at "
        f"random{moved}"
    )


def _write_parts(store: str, stamp: StoreStamp, clips: _Clips, shards: Sequence[str]) -> None:
    left = sum(len(clips.manifest.rows_of_shard(shard)) for shard in shards)
    threads = ThreadPoolExecutor(usable_cores(), thread_name_prefix="import")
    with progress_bar("importing", len(clips.manifest), done=len(clips.manifest) - left) as bar:
        try:
            for _ in threads.map(lambda shard: _write_part(store, stamp, clips, shard, bar), shards):
                pass
        finally:
            threads.shutdown(cancel_futures=True)


def _write_part(store: str, stamp: StoreStamp, clips: _Clips, shard: str, bar: ProgressBar) -> None:
    manifest = clips.manifest
    of_shard = manifest.rows_of_shard(shard)
    known = clips.found.with_rows(of_shard)
    logits = clips.logits(known)  # (known clips, classes)
    finite = np.isfinite(logits).all(axis=1)
    failures = [
        ClipFailure(clip_id=clip_id, reason="non-finite logits", detail="in the files that were imported")
        for clip_id in manifest.clip_ids.take(pa.array(known[~finite])).to_pylist()
    ]
    ids = manifest.clip_ids.take(pa.array(known[finite])).to_pylist()
    publish_part(store, part_stem(shard), ids, logits[finite], stamp, manifest.shard_identity(shard), failures)
    bar.advance(len(of_shard))


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
