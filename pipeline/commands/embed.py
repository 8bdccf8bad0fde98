"""`pipeline embed`: one vector a clip, of a student's or a teacher's layers, into Parquet."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.embeddings.extracting import embed_shards
from pipeline.embeddings.layers import PENULTIMATE, Embedder
from pipeline.embeddings.store import EmbeddingPart, EmbeddingStamp, claim, finished_parts, write_failures
from pipeline.errors import TooManyFailuresError, UsageError
from pipeline.labelling.teacher_spec import TeacherSpec
from pipeline.logits.filling import check_part_names
from pipeline.logits.store import FAILED_NAME
from pipeline.models.device import Precision, choose_device
from pipeline.models.loading import LoadedModel, load_model
from pipeline.runtime.output import print_line
from pipeline.runtime.progress import progress_bar
from pipeline.runtime.recipes import read_options
from pipeline.storage import files as storage
from pipeline.storage.one_writer import one_writer


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Which model's layers, over which dataset."""

    data: str
    """Dataset: a folder or URL with shards and a manifest."""
    checkpoint: str | None = None
    """Weights of a student or a teacher: a file, a URL, or a released model's name such as mn10_as, which is fetched
    once. NAME=FILE names the model in a file that does not say it."""
    teacher: str | None = None
    """In its place a teacher, NAME for its released weights or NAME=CHECKPOINT, such as passt_s or ced_tiny."""
    out: str
    """Folder or URL to write, or to go on with: a Parquet part for each shard, clip_id and float16 embedding."""
    layer: str = PENULTIMATE
    """What is taken: penultimate (what the last layer sees), logits, b5 (the mean of block 5), several joined by +; of
    students also features (the last maps' mean), mels, se5 (squeeze-excitation of block 5), or efficientat, the
    embedding of EfficientAT's authors."""
    model: str | None = None
    """Registered name of the model in a file that does not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of that model, such as strides, se_dims or fmin, where they are not the name's."""
    classes: str | None = None
    """Class list of a file that does not say it, in the format of AudioSet's class_labels_indices.csv; the dataset may
    have other classes."""
    batch_size: int | None = None
    """Clips a forward pass, 1 or more; by default 64 on a GPU, 32 without one. Batches don't cross shards."""
    workers: int | None = None
    """Processes that read and decode, at most one a core; 0 decodes between the forward passes. By default one for each
    core where a GPU is fed, and up to 4 without one."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""
    precision: Precision = "float32"
    """What the network computes in; front ends always compute in float32."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the clips that may end without an embedding."""
    overwrite: bool = False
    """Replace what another model, layer or precision made."""

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.teacher is None):
            raise UsageError("give --checkpoint or --teacher, one of them: whose embeddings it shall be")
        if storage.is_same_place(self.data, self.out):
            raise UsageError(f"data and out are both {self.data}; give the embeddings a folder of their own")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; choose 1 or more")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers is {self.workers}; choose 0 or more")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")


def run(config: Annotated[EmbedConfig, Parameter(name="*")]) -> None:
    """Write an embedding of each clip of a dataset, for classifiers, searches and maps of your own.

    Each shard becomes one Parquet part, whole or not at all. The same command again does only the shards whose part is
    missing, or was made from another version of the shard. Clips that can't be read or decoded are listed in
    OUT/failed.parquet with the reason.

    Raises:
        PipelineError: the dataset, the model or the folder is unusable.
        TooManyFailuresError: more clips failed than `max_failed` allows; what could be done was done.
    """
    manifest = read_manifest(config.data)
    check_part_names(manifest)
    device = choose_device(config.device)
    loaded = _load(config, device)
    embedder = Embedder(loaded.network, config.layer, loaded.name).eval()
    stamp = EmbeddingStamp(
        model=loaded.model_name,
        sha256=loaded.sha256,
        front_end=loaded.front_end,
        layers=config.layer,
        size=embedder.size,
        precision=config.precision,
    )
    with one_writer(config.out):
        claim(config.out, stamp, overwrite=config.overwrite)
        done = finished_parts(config.out, stamp, manifest)
        left = [shard for shard in manifest.shards if shard not in done]
        clips_done = sum(len(manifest.rows_of_shard(shard)) for shard in done)
        with progress_bar("embedding", len(manifest), done=clips_done) as bar:
            embed_shards(
                embedder,
                manifest,
                left,
                config.out,
                stamp,
                batch_size=config.batch_size,
                workers=config.workers,
                device=device,
                precision=config.precision,
                on_clips=bar.advance,
            )
        parts = finished_parts(config.out, stamp, manifest)
        write_failures(config.out, parts.values())
        storage.write_listing(config.out)
    _conclude(config, manifest, parts, stamp)


def _load(config: EmbedConfig, device: torch.device) -> LoadedModel:
    """Load the model; its classes need not be the dataset's, since none of them is asked for."""
    more: dict[str, Any] = {
        "options": read_options(config.model_options),
        "classes": None if config.classes is None else read_vocabulary(config.classes),
        "device": device,
    }
    if config.teacher is None:
        return load_model(config.checkpoint, model=config.model, **more)
    spec = TeacherSpec.parse(config.teacher)
    name = spec.name
    loaded = load_model(spec.checkpoint, model=name, offline=spec.offline, **more)
    import teacher

    if not isinstance(loaded.network, teacher.AudioTransformer):
        raise UsageError(f"--teacher {config.teacher}: {name} is a student; name it with --checkpoint")
    return loaded


def _conclude(config: EmbedConfig, manifest: Manifest, parts: dict[str, EmbeddingPart], stamp: EmbeddingStamp) -> None:
    reasons = Counter(one.reason for part in parts.values() for one in part.failures)
    failed, clips = reasons.total(), len(manifest)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print_line(
        f"{config.out}: {stamp.layers} of {stamp.model}, {stamp.size} numbers a clip, of {clips - failed} of {clips} "
        f"clips{f'; {failed} failed ({why})' if failed else ''}"
    )
    if failed > config.max_failed * clips:
        raise TooManyFailuresError(
            f"{failed} of {clips} clips of {manifest.location} have no embedding ({why}). "
            f"{storage.join_path(config.out, FAILED_NAME)} names them. Allow more with --max-failed"
        )
