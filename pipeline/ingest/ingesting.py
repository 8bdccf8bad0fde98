"""What every `pipeline ingest` command does once its source is known: plan, pack, finish."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.sound_decoders import LOWEST_RATE_HZ
from pipeline.dataset.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import ManifestError, UsageError
from pipeline.ingest.dataset_folder import DatasetFolder
from pipeline.ingest.held_clips import HeldClips
from pipeline.ingest.packing import pack_shard
from pipeline.ingest.plan import Plan, PlannedShard, make_plan, plan_shards
from pipeline.ingest.preparing import ClipPreparation
from pipeline.ingest.rejections import count_by_reason, rejection_table, tabulate, told_in_one_line
from pipeline.ingest.sources import Source, from_folder
from pipeline.ingest.transcoding import HIGHEST_FLAC_RATE_HZ, OPUS_RATES_HZ, Transcoding
from pipeline.ingest.video_stripping import VideoStripping
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.output import print_line, print_table
from pipeline.runtime.progress import ProgressBar, progress_bar
from pipeline.runtime.ray_address import check_address
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.storage import files as storage
from pipeline.storage.one_writer import one_writer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """What dataset the clips become, and how; the settings that all sources share."""

    out: str
    """The dataset folder to make: a path or a URL."""
    name: str | None = None
    """What the shards are called before their number; the name of the dataset folder unless given."""
    clips_per_shard: int = 1000
    """Clips in one shard, at least 1. A shard of 1000 ten-second clips is 100 MB to 1 GB."""
    workers: int | None = None
    """Processes that decode, and threads that read, at least 1; one for each core that may be used, unless given."""
    patience: float = PATIENCE_SECONDS
    """Seconds that one of them may be waited for without a sign of life, before the ingest ends; what is done is kept.
    """
    address: str | None = None
    """Of a Ray cluster that packs the shards: HOST:PORT, or auto where this machine belongs to one. Its machines have
    to see the source and --out under the same paths; --workers is then how many shards are packed at the same time."""
    transcode: Literal["flac", "opus"] | None = None
    """Encode every sound anew: flac loses nothing, opus (in Ogg) has 64 kbit/s a channel. The bytes stay as they are
    unless given."""
    sample_rate: int | None = None
    """Sample rate in Hz of what --transcode encodes; each sound's own unless given. Opus knows 8000, 12000, 16000,
    24000 and 48000."""
    strip_video: bool = False
    """Drop the video beside a sound, as of .mp4, .mkv and .webm; the sound's own bytes stay as they are."""
    classes: str | None = None
    """The class list that the labels are looked up in, in the format of AudioSet's class_labels_indices.csv. Unless
    given: that of the dataset that is added to, else AudioSet's own 527, or the classes that own data names."""
    add: bool = False
    """Put the clips into the finished dataset at --out, in shards of their own. A clip that it holds already stays."""
    overwrite: bool = False
    """Replace the dataset that is there."""

    def __post_init__(self) -> None:
        if self.clips_per_shard < 1:
            raise UsageError(f"--clips-per-shard is {self.clips_per_shard}; choose 1 or more")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; choose 1 or more")
        if not self.patience > 0:
            raise UsageError(f"--patience is {self.patience}; choose a number of seconds above 0")
        if not re.fullmatch(r"\w[\w.+-]*", self.shard_name):
            raise UsageError(f"--name {self.shard_name!r}: use letters, digits and any of `_ . + -`")
        check_address(self.address)
        if self.strip_video and self.transcode is not None:
            raise UsageError("--strip-video keeps the sound's bytes, --transcode encodes them anew; choose one")
        if self.sample_rate is not None and self.transcode is None:
            raise UsageError("--sample-rate needs --transcode flac or opus; without, the bytes are kept as they are")
        if self.sample_rate is not None and not LOWEST_RATE_HZ <= self.sample_rate <= HIGHEST_FLAC_RATE_HZ:
            raise UsageError(
                f"--sample-rate is {self.sample_rate} Hz; choose {LOWEST_RATE_HZ} to {HIGHEST_FLAC_RATE_HZ}"
            )
        if self.transcode == "opus" and self.sample_rate not in (None, *OPUS_RATES_HZ):
            rates = ", ".join(map(str, OPUS_RATES_HZ))
            raise UsageError(
                f"--sample-rate {self.sample_rate}: Opus knows only {rates} Hz; --transcode flac takes any"
            )
        if self.add and self.overwrite:
            raise UsageError("--add keeps the dataset that --overwrite would replace; choose one")

    @property
    def encoding(self) -> Transcoding | VideoStripping | None:
        """What is done to the bytes."""
        if self.strip_video:
            return VideoStripping()
        return None if self.transcode is None else Transcoding(self.transcode, self.sample_rate)

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
    """In the dataset, those included that it held before."""
    added: int
    shards: int
    audio_bytes: int
    rejected: dict[str, int]
    """Reason → how many were left out."""
    notes: dict[str, int]
    """What else was seen → how often."""


def ingest(config: IngestConfig, source: Source) -> IngestResult:
    """Make a dataset of a source's clips, or add them to one.

    The same input gives the same bytes. A stopped run leaves no manifest, or the manifest that was there before it, and
    the same command goes on where it stopped.

    Raises:
        ManifestError: the source is malformed, or no clip could be used.
        UsageError: the dataset is there already, or is not there to be added to, or the folder holds tars of somebody
            else, or the classes are others.
    """
    folder = DatasetFolder(config.out, config.shard_name, _dataset_to_extend(config))
    folder.check(overwrite=config.overwrite)
    vocabulary = _vocabulary(config, source, folder.base)
    base = folder.base
    held = pa.array([], pa.string()) if base is None else base.clip_ids
    are_held = None if base is None else HeldClips(base, source, config.encoding).are_held
    with progress_bar("plan", None) as bar:
        plan = make_plan(source, vocabulary, held, on_items=bar.advance, are_held=are_held)
    left_out = f"; not usable: {plan.rejected.num_rows:,}" if plan.rejected.num_rows else ""
    _log.info("%s: packing %d clips%s", config.out, plan.clips.num_rows, left_out)
    if not plan.clips.num_rows:
        return _conclude_without_clips(folder, plan)

    shards = plan_shards(
        config.shard_name,
        plan.clips,
        config.clips_per_shard,
        vocabulary,
        recipe=str(config.encoding or ""),
        first_number=folder.first_number,
    )
    fingerprints = {shard.name: shard.fingerprint() for shard in shards}
    with one_writer(config.out):
        folder.claim()
        _pack(config, source, shards, folder.finished_shards(fingerprints))
        ledgers = folder.ledgers(fingerprints)
        manifest = folder.finish(ledgers, plan.rejected, vocabulary)
    left_out = pa.concat_tables([plan.rejected, *(tabulate(ledger.rejections) for ledger in ledgers)])
    notes = sum((Counter(ledger.notes) for ledger in ledgers), plan.notes)
    return _conclude(manifest, sum(ledger.rows.num_rows for ledger in ledgers), left_out, notes)


def _dataset_to_extend(config: IngestConfig) -> Manifest | None:
    return read_manifest(config.out) if config.add else None


def _vocabulary(config: IngestConfig, source: Source, base: Manifest | None) -> Vocabulary:
    if config.classes is None:
        return source.own_vocabulary() if base is None else base.vocabulary
    given = read_vocabulary(config.classes)
    if base is not None and given.sha256 != base.vocabulary.sha256:
        raise UsageError(
            f"--classes {config.classes}: is not the class list of {config.out}, whose labels and logits point into "
            "its own. Leave --classes out to look the new labels up there"
        )
    return given


def _pack(config: IngestConfig, source: Source, shards: Sequence[PlannedShard], finished: set[str]) -> None:
    """Make the shards that an earlier run of the same command has not made."""
    left = [shard for shard in shards if shard.name not in finished]
    clips, clips_left = sum(map(len, shards)), sum(map(len, left))
    with progress_bar("ingest", clips, done=clips - clips_left) as bar:
        if config.address is not None and left:
            _pack_on_ray(config, source, left, bar)
            return
        workers = config.workers or usable_cores()
        with (
            source.open_reader() as read_clips,
            ClipPreparation(workers, config.encoding, patience=config.patience) as preparation,
        ):
            for shard in left:
                pack_shard(config.out, shard, read_clips, preparation, on_clip=bar.advance)


def _pack_on_ray(config: IngestConfig, source: Source, shards: Sequence[PlannedShard], bar: ProgressBar) -> None:
    # Ray takes seconds to import; a run on this machine should not wait for it.
    from pipeline.ingest.packing_pool import pack_shards
    from pipeline.runtime.ray_session import running_ray

    dataset = from_folder(os.getcwd(), config.out)  # a worker's working folder is Ray's affair
    with running_ray(config.address):
        for clips in pack_shards(dataset, source, shards, config.encoding, config.workers, patience=config.patience):
            bar.advance(clips)


def _conclude_without_clips(folder: DatasetFolder, plan: Plan) -> IngestResult:
    if folder.base is None:
        raise ManifestError(f"{folder.location}: there is no clip to pack {told_in_one_line(plan.rejected)}")
    return _conclude(folder.base, 0, plan.rejected, plan.notes)


def _conclude(manifest: Manifest, added: int, left_out: pa.Table, notes: Mapping[str, int]) -> IngestResult:
    result = IngestResult(
        clips=len(manifest),
        added=added,
        shards=len(manifest.shards),
        audio_bytes=int(manifest.sizes.sum()),
        rejected=count_by_reason(left_out),
        notes=dict(notes),
    )
    if result.rejected:
        print_table(rejection_table(result.rejected))
    print_line(
        f"{manifest.location}: {result.clips:,} clips, {result.audio_bytes / 1e6:,.1f} MB; shards: {result.shards:,}"
        + (f"; {added:,} clips added" if added < result.clips else "")
        + "".join(f" ({count:,} {note})" for note, count in result.notes.items())
    )
    return result
