"""`pipeline ingest audioset`: AudioSet's segment lists and audio files → a dataset of shards and a manifest."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline import storage
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.audioset import find_audio_files, match_files, read_audio_file
from pipeline.ingest.dataset_folder import Ledger, check_folder, claim_folder, finish_folder, finished_ledgers
from pipeline.ingest.packing import PlannedShard, pack_shard, plan_shards
from pipeline.ingest.rejections import count_by_reason, rejection_table
from pipeline.progress import console, progress_bar
from pipeline.segments import read_segment_files
from pipeline.vocabulary import audioset_vocabulary, read_vocabulary

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestAudiosetConfig:
    """Which clips, where their files are, and what dataset they become."""

    segments: tuple[str, ...]
    """AudioSet's segment lists, such as balanced_train_segments.csv; several become one dataset."""
    audio: str
    """The folder with the audio files, in any depth, called ID.EXT, YID.EXT, ID_START.EXT or ID_START_END.EXT."""
    out: str
    """The dataset folder to make: a path or a URL."""
    name: str | None = None
    """What the shards are called before their number; the name of the dataset folder unless given."""
    clips_per_shard: int = 1000
    """Listed clips in one shard, at least 1. A shard of 1000 ten-second clips is 100 MB to 1 GB."""
    workers: int | None = None
    """Files read and decoded at the same time, at least 1; one for each processor unless given."""
    classes: str | None = None
    """A class list in the format of AudioSet's class_labels_indices.csv; AudioSet's own 527 unless given."""
    overwrite: bool = False
    """Replace the dataset that is there."""

    def __post_init__(self) -> None:
        if not self.segments:
            raise UsageError("--segments needs at least one file")
        if self.clips_per_shard < 1:
            raise UsageError(f"--clips-per-shard is {self.clips_per_shard}; choose 1 or more")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; choose 1 or more")
        if storage.is_remote(self.audio):
            raise UsageError(f"--audio {self.audio}: has to be a local folder; mount the bucket, or copy the files")
        if not re.fullmatch(r"\w[\w.+-]*", self.shard_name):
            raise UsageError(f"--name {self.shard_name!r}: use letters, digits and any of `_ . + -`")

    @property
    def shard_name(self) -> str:
        """What the shards are called before their number."""
        return (
            self.name or Path(self.out if storage.is_remote(self.out) else storage.local_path(self.out).absolute()).name
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    """What an ingest made."""

    clips: int
    shards: int
    audio_bytes: int
    rejected: dict[str, int]
    """Reason → how many were left out."""
    unlisted_files: int
    """Audio files in the folder that are no clip of the lists."""


def run(config: Annotated[IngestAudiosetConfig, Parameter(name="*")]) -> IngestResult:
    """Turn AudioSet's segment lists and audio files into a dataset: WebDataset shards and a manifest.

    The encoded bytes are kept as they are. Every file is decoded once to see that it can be; the ones that can't, and
    those that are missing, are listed in the dataset's rejected.parquet. The same input gives the same bytes. A stopped
    run leaves no manifest, and the same command goes on where it stopped.

    Raises:
        ManifestError: a list is malformed, or no clip could be used.
        UsageError: the dataset is there already, or the folder holds tars of somebody else.
    """
    folder = storage.local_path(config.audio)
    if not folder.is_dir():
        raise UsageError(f"--audio {config.audio}: is no folder")
    check_folder(config.out, config.shard_name, overwrite=config.overwrite)
    vocabulary = read_vocabulary(config.classes) if config.classes else audioset_vocabulary()
    segments = read_segment_files(config.segments, vocabulary)
    match = match_files(segments, find_audio_files(folder))
    _log.info("%d of %d listed clips have a file in %s", len(match.clips), len(segments), folder)
    if not match.clips:
        raise ManifestError(
            f"none of the {len(segments)} listed clips has a file in {config.audio}; is it the right folder?"
        )

    shards = plan_shards(config.shard_name, match.clips, config.clips_per_shard, vocabulary)
    claim_folder(config.out)
    ledgers = _pack(config, shards, folder)
    manifest = finish_folder(config.out, ledgers, match.rejections, vocabulary)
    rejections = match.rejections + [item for ledger in ledgers for item in ledger.rejections]
    result = IngestResult(
        clips=len(manifest),
        shards=len(manifest.shards),
        audio_bytes=int(manifest.sizes.sum()),
        rejected=count_by_reason(rejections),
        unlisted_files=match.unlisted_files,
    )
    _show(result, config.out)
    return result


def _pack(config: IngestAudiosetConfig, shards: Sequence[PlannedShard], folder: Path) -> list[Ledger]:
    """Make the shards that an earlier run of the same command has not made."""
    ledgers = finished_ledgers(config.out, {shard.name: shard.fingerprint() for shard in shards})
    done = sum(len(shard.clips) for shard in shards if shard.name in ledgers)
    with progress_bar("ingest", sum(len(shard.clips) for shard in shards), done=done) as bar:
        for shard in shards:
            if shard.name not in ledgers:
                ledgers[shard.name] = pack_shard(
                    config.out,
                    shard,
                    read_audio=partial(read_audio_file, folder),
                    workers=config.workers or os.cpu_count() or 1,
                    on_clip=bar.advance,
                )
    return [ledgers[shard.name] for shard in shards]


def _show(result: IngestResult, dataset: str) -> None:
    if result.rejected:
        console().print(rejection_table(result.rejected))
    console().print(
        f"{dataset}: {result.clips:,} clips, {result.audio_bytes / 1e6:,.1f} MB; shards: {result.shards:,}"
        + (f" ({result.unlisted_files:,} files in no list)" if result.unlisted_files else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
