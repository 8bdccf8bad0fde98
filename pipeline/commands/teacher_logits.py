"""`pipeline teacher-logits`, stage 1: dataset → Ray actors with the teachers → logit store."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Annotated, cast, get_args

from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.views import MAX_VIEWS, ViewConfig, ViewsStamp
from pipeline.errors import PipelineError, TooManyFailuresError, UsageError
from pipeline.labelling.begun_stores import stamp_to_go_on_with
from pipeline.labelling.labelling_speed import LabellingSpeed, write_speed
from pipeline.labelling.shard_labeller import LabellerConfig
from pipeline.labelling.teacher_spec import TeacherSpec, parse_teachers, stamp_teachers
from pipeline.logits.filling import check_part_names, claim_store, finished_shards
from pipeline.logits.part_ranges import finished_ranges, remove_ranges
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import FAILED_NAME, LogitPart, finished_parts, read_stamp, write_failures
from pipeline.models.device import Precision, PrecisionChoice, choose_device, fastest_precision
from pipeline.runtime.progress import progress_bar
from pipeline.runtime.ray_address import check_address, cluster_address
from pipeline.runtime.stopping import stop_on_signals
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.storage import files as storage
from pipeline.storage.one_writer import one_writer
from pipeline.storage.outages import outlast

_FIGURES = ("clips", "seconds", "waiting_seconds", "copying_seconds", "publishing_seconds", "idle_seconds")
"""Of a `ShardOutcome`; they are added up as shards end, for there may be very many."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLogitsConfig:
    """Which teachers, over which dataset, with which machines."""

    data: str
    """Dataset: a folder or URL with shards and a manifest."""
    teacher: tuple[str, ...]
    """NAME for its released weights, fetched once, or NAME=CHECKPOINT, such as passt_s=passt-s.pt; several are an
    ensemble, whose logits are the mean with the weights that may follow, such as passt_s@2 (1 where none is given)."""
    store: str
    """Logit store to write or to go on with: a folder or URL."""
    keep_members: bool = False
    """Also keep each teacher's own logits, so that `pipeline reweight` can weigh them anew; a row grows by one list for
    each teacher."""
    top_k: int | None = None
    """Keep only this many logits of a clip, the largest, and one that stands for the others; 20 of 527 classes take a
    ninth of the space. Without it all are kept."""
    views: int = 1
    """Views of each clip: the clip as it is, and one fewer augmented ones, which a student is then shown just so."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """What views may do to a clip."""
    batch_size: int | None = None
    """Clips a forward pass, 1 or more; by default 64 on GPUs, 16 without. Batches don't cross shards."""
    precision: PrecisionChoice = "auto"
    """What the networks' matrix products compute in; front ends, norms and the last layer always compute in float32,
    and logits are stored as float16. auto goes on with what the store was begun with; a new store gets bfloat16 where
    the GPUs, or without any the CPUs, of all machines that the teachers run on have instructions for it, float16 where
    some GPUs are older, and float32 on other CPUs. tf32 rounds what a GPU multiplies to 10 bits. |Difference| to
    float32 in the logits, median and 99.9th percentile, of trained teachers on real clips: bfloat16 0.002 and 0.015,
    float16 and tf32 0.0001 and 0.001."""
    compile: bool | None = None
    """Let torch.compile translate the teachers' blocks, which takes the better part of a minute, for the batches that
    are full: 13 % (PaSST, AST) to 44 % (CED) more clips/s on an H100. By default on GPUs with 300,000 clips or more for
    each actor. Where it does not work, or changes logits by more than the precision does, they run as they are, and a
    line says so."""
    decode_workers: int = 0
    """Processes an actor decodes with, ahead of the teachers; 0 is one for each of its cores."""
    patience: float = PATIENCE_SECONDS
    """Seconds that an actor, or a process that decodes for it, may be waited for without a sign of life. Then the shard
    is begun again, up to three times; the others are done all the same."""
    address: Annotated[str | None, Parameter(env_var="RAY_ADDRESS")] = None
    """Of the Ray cluster that this machine belongs to: HOST:PORT, or auto to find it. Without it Ray runs on this
    machine for this run. A submitted job finds its own cluster."""
    actors: int | str | None = None
    """Processes that label shards, each with all teachers; by default one for each GPU, or one for each machine.
    MIN:MAX begins with MIN and uses the machines that join meanwhile."""
    gpus_per_actor: float | None = None
    """GPUs an actor claims; below 1, actors share one. By default 1 where there are any, else 0."""
    cpus_per_actor: int | None = None
    """Cores an actor claims and computes with; by default an even share of all."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the dataset's clips that may end without logits."""
    redo_failed: bool = False
    """Also do the shards again in which clips failed, for when their files were mended."""
    trust_remote_code: tuple[str, ...] = ()
    """ORG/NAME of a teacher hf:ORG/NAME whose repository's own code may be run, on every machine that labels. None is
    otherwise."""
    overwrite: bool = False
    """Replace a store that other teachers, weights, classes, views or another precision made."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UsageError("no teacher: give --teacher NAME at least once, such as --teacher passt_s")
        parse_teachers(self.teacher, self.trust_remote_code)
        if storage.is_same_place(self.data, self.store):
            raise UsageError(f"data and store are both {self.data}; give the store a folder of its own")
        check_address(self.address)
        if self.keep_members and self.top_k is not None:
            raise UsageError(
                "keep_members needs all logits: without them they can't be weighed anew. Leave top_k out, and make a "
                "small copy of the store with `pipeline reweight --top-k`"
            )
        if not 1 <= self.views <= MAX_VIEWS:
            raise UsageError(f"views is {self.views}; choose 1 (the clip as it is) to {MAX_VIEWS}")
        if self.actor_range is not None and not 1 <= self.actor_range[0] <= self.actor_range[1]:
            raise UsageError(f"actors is {self.actors}; choose 1 or more, or MIN:MAX with MIN not above MAX")
        for name in ("batch_size", "cpus_per_actor", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; choose 1 or more")
        for name in ("decode_workers", "gpus_per_actor"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}; choose 0 or more")
        if not self.patience > 0:
            raise UsageError(f"patience is {self.patience}; choose a number of seconds above 0")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """How many actors at least and at most, where that was said.

        Raises:
            UsageError: it is no number, nor two.
        """
        if self.actors is None:
            return None
        numbers = str(self.actors).split(":")
        if len(numbers) > 2 or not all(number.strip().lstrip("-").isdecimal() for number in numbers):
            raise UsageError(f"actors is {self.actors}; choose a number, or MIN:MAX such as 2:8")
        return int(numbers[0]), int(numbers[-1])


def run(config: Annotated[TeacherLogitsConfig, Parameter(name="*")]) -> None:
    """Stage 1: run transformers over a dataset, on Ray, and store the mean of their logits.

    Each shard becomes one Parquet part of the store, whole or not at all. The same command again does only the shards
    whose part is missing, or was made from another version of the shard. Clips that can't be read or decoded, or get
    logits that are not finite, are listed in STORE/failed.parquet with the reason.

    Raises:
        PipelineError: the dataset, a teacher or the store is unusable, or some shards could not be done; what could
            be done was done.
        TooManyFailuresError: more clips failed than `max_failed` allows; what could be done was done.
    """
    data, store = _absolute(config.data), _absolute(config.store)
    specs = tuple(map(_with_absolute_path, parse_teachers(config.teacher, config.trust_remote_code)))
    manifest = read_manifest(data)
    check_part_names(manifest)
    stamp = _stamp(config, stamp_teachers(specs, manifest, "float32"))
    stamp = replace(stamp, precision=_precision(config, read_stamp(store)))
    auto = config.precision == "auto"
    stamp = stamp_to_go_on_with(store, stamp, manifest, any_precision=auto, overwrite=config.overwrite)
    if auto:
        _log.info("precision: %s", stamp.precision)
    with one_writer(store):
        claim_store(store, stamp, overwrite=config.overwrite)

        finished = finished_shards(store, stamp, manifest)
        redo = {shard for shard, part in finished.items() if part.failures and config.redo_failed}
        shards = [shard for shard in manifest.shards if shard not in finished or shard in redo]
        labeller = LabellerConfig(
            data=data,
            store=store,
            teachers=specs,
            stamp=stamp,
            batch_size=config.batch_size or 0,
            decode_workers=config.decode_workers,
            patience=config.patience,
            compile=config.compile,
        )
        begun = finished_ranges(store, stamp, manifest) if shards else {}
        try:
            done = {shard: begun[shard] for shard in shards if shard in begun and shard not in redo}
            errors = _label(config, labeller, manifest, shards, done) if shards else {}
        finally:
            storage.remove_staged(store)  # of actors that were stopped while they wrote
        finished = outlast(lambda: _finish(store, stamp, manifest), config.patience)
        _conclude(manifest, store, finished, errors, config.max_failed)


def _finish(store: str, stamp: StoreStamp, manifest: Manifest) -> dict[str, LogitPart]:
    """Write the lists of failures and files; returns the shards whose part is there."""
    finished = finished_shards(store, stamp, manifest)
    if len(finished) == len(manifest.shards):
        remove_ranges(store)
    write_failures(store, list(finished_parts(store, stamp).values()))
    storage.write_listing(store)
    return finished


def _stamp(config: TeacherLogitsConfig, teachers: StoreStamp) -> StoreStamp:
    """Add the form of the store to what its teachers are."""
    if config.top_k is not None and config.top_k >= teachers.classes:
        raise UsageError(
            f"top_k is {config.top_k}, but {config.data} has {teachers.classes} classes; choose fewer, or leave it out"
        )
    return replace(
        teachers,
        members="float16" if config.keep_members else None,
        top_k=config.top_k,
        views=ViewsStamp(count=config.views, config=config.view) if config.views > 1 else None,
    )


def _precision(config: TeacherLogitsConfig, begun: StoreStamp | None) -> Precision:
    """Returns the precision that is asked for, or of a store that was begun, or the fastest where the teachers run."""
    if config.precision != "auto":
        return config.precision
    if begun is not None and begun.precision in get_args(Precision) and not config.overwrite:
        return cast("Precision", begun.precision)
    if cluster_address(config.address) is None:
        return fastest_precision("cpu" if config.gpus_per_actor == 0 else choose_device("auto"))
    from pipeline.labelling.cluster_precision import fastest_on_cluster  # Ray takes seconds to import

    return fastest_on_cluster(config.address, config.gpus_per_actor, config.patience)


def _absolute(location: str) -> str:
    # An actor's working folder is Ray's affair.
    return location if storage.is_remote(location) else str(storage.local_path(location).resolve())


def _label(
    config: TeacherLogitsConfig,
    labeller: LabellerConfig,
    manifest: Manifest,
    shards: Sequence[str],
    begun: Mapping[str, Sequence[tuple[int, int]]],
) -> dict[str, str]:
    """Label the shards, parts of which may be `begun`; give what stopped those that could not be done."""
    # Ray takes seconds to import; `--help` and a run that has nothing left to do should not wait for it.
    from pipeline.labelling.actor_pool import label_shards
    from pipeline.runtime.ray_session import running_ray

    clips = {shard: len(manifest.rows_of_shard(shard)) for shard in shards}
    left = sum(clips.values()) - sum(stop - start for pieces in begun.values() for start, stop in pieces)
    errors: dict[str, str] = {}
    totals: dict[str, float] = dict.fromkeys(_FIGURES, 0.0)
    started = perf_counter()
    with (
        running_ray(config.address),
        stop_on_signals(at_once=True) as stop,
        progress_bar("teacher logits", len(manifest), done=len(manifest) - left) as bar,
        closing(
            label_shards(
                labeller,
                clips,
                done=begun,
                actors=config.actor_range,
                cpus_per_actor=config.cpus_per_actor,
                gpus_per_actor=config.gpus_per_actor,
                on_clips=bar.advance,
            )
        ) as outcomes,
    ):
        for outcome in outcomes:
            if stop.requested:
                raise KeyboardInterrupt  # the one that the signal raised got lost in Ray
            if outcome.warning:
                _log.warning("%s", outcome.warning)
            if outcome.ends_run:
                raise PipelineError(outcome.error)
            if outcome.error:
                errors[outcome.shard] = outcome.error
            for figure in _FIGURES:
                totals[figure] += getattr(outcome, figure)
    _note_speed(labeller.store, totals, perf_counter() - started)
    return errors


def _note_speed(store: str, totals: Mapping[str, float], seconds: float) -> None:
    clips, busy, idle = int(totals["clips"]), totals["seconds"], totals["idle_seconds"]
    if busy:
        write_speed(store, LabellingSpeed(clips=clips, busy_seconds=busy, seconds=seconds))
        _log.info(
            "%d clips in %.0f s, starting Ray included: %.1f clips/s an actor; its teachers waited for decoded clips "
            "%.1f %% of the time, for copies %.1f %%, for logits to be published %.1f %%, and for Ray %.1f %%",
            clips,
            seconds,
            clips / busy,
            *(100 * totals[figure] / (busy + idle) for figure in _FIGURES[2:]),
        )


def _conclude(
    manifest: Manifest, store: str, finished: Mapping[str, LogitPart], errors: Mapping[str, str], limit: float
) -> None:
    """Log how complete the store is, and fail where it is not complete enough."""
    parts = list(finished.values())
    failures = Counter(failure.reason for part in parts for failure in part.failures)
    reasons = ", ".join(f"{count} {reason}" for reason, count in failures.most_common())
    clips, failed = len(manifest), failures.total()
    labelled = sum(part.clips for part in parts)
    _log.info(
        "%s: logits of %d of %d clips; %d failed%s", store, labelled, clips, failed, f" ({reasons})" if failed else ""
    )
    if errors:
        shard, error = next(iter(errors.items()))
        raise PipelineError(
            f"{len(errors)} of {len(manifest.shards)} shards could not be done. {shard}: {error} "
            "The others are in the store; the same command does what is missing."
        )
    if missing := [shard for shard in manifest.shards if shard not in finished]:
        raise PipelineError(
            f"{len(missing)} of {len(manifest.shards)} shards were done, but their parts are not in {store} any more, "
            f"such as that of {missing[0]}: somebody else writes there, or removed them. The same command makes them."
        )
    if failed > limit * clips:
        raise TooManyFailuresError(
            f"{failed} of {clips} clips of {manifest.location} have no logits ({100 * failed / clips:.1f} %, limit "
            f"{100 * limit:g} %): {reasons}. {storage.join_path(store, FAILED_NAME)} names them. Mend them and run "
            "again with --redo-failed, or allow more with --max-failed."
        )


def _with_absolute_path(spec: TeacherSpec) -> TeacherSpec:
    # What is no path of ours is left alone: a teacher's own builder may take anything for a checkpoint.
    if spec.checkpoint is None or storage.is_remote(spec.checkpoint) or not storage.exists(spec.checkpoint):
        return spec
    return replace(spec, checkpoint=_absolute(spec.checkpoint))
