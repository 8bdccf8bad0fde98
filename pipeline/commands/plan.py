"""`pipeline plan`: hours, GPU hours and bytes of both stages, before anything runs."""

import logging
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.table import Table

import student
from pipeline.batches.sampling import sampling_weights
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import UsageError
from pipeline.labelling.labelling_speed import measure_labelling, read_speed
from pipeline.labelling.shard_labeller import BATCH_SIZES
from pipeline.labelling.teacher_spec import parse_teachers
from pipeline.logits.store import LogitStore, open_store
from pipeline.models.device import choose_device, fastest_precision
from pipeline.models.loading import build_for_training
from pipeline.models.model_tables import model_facts
from pipeline.runtime.output import print_line, print_table
from pipeline.training.loop import TrainingConfig
from pipeline.training.student_learner import StudentLearner
from pipeline.training.training_speed import measure_training, speed_of_run
from pipeline.verification.folder_kinds import kind_of
from pipeline.verification.inspection import summarise_run

_FLOAT32_BYTES, _FLOAT16_BYTES = 4, 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What is to be planned, and which speeds are known."""

    data: str
    """Dataset that is to be labelled and learned from: a folder or URL with a manifest."""
    teacher: tuple[str, ...] = ()
    """The teachers, as for `pipeline teacher-logits`; without them those of the measured store."""
    model: str | None = None
    """The student; without it that of the measured run, or mn10."""
    gpus: int = 1
    """How many GPUs share the work, each as fast as the one that was measured; where that was a machine without a GPU,
    so many machines like it. 1 or more."""
    measured: tuple[str, ...] = ()
    """Smaller runs on hardware like that: a logit store whose speed counts for stage 1, a run for stage 2. A stage
    without one is measured here and now, on this machine's device."""
    clips_per_epoch: int = 100_000
    """Clips of an epoch of stage 2, as for `pipeline train-student`."""
    epochs: int = 200
    """Epochs of stage 2, 1 or more."""
    batch_size: int = 120
    """Clips a step of stage 2, where it is measured here."""
    price: float | None = None
    """What a GPU costs an hour, in any currency; adds a line."""
    device: str = "auto"
    """Where to measure: cpu, cuda …; auto takes a GPU where there is one."""
    seconds: float = 20.0
    """How long to measure each stage, above 0; at least two batches are."""

    def __post_init__(self) -> None:
        for name in ("gpus", "clips_per_epoch", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if not self.seconds > 0:
            raise UsageError(f"seconds is {self.seconds}; choose a number above 0")
        parse_teachers(self.teacher)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What one stage, or a part of it, will take."""

    title: str
    clips: int
    clips_per_second: float
    """Of one GPU, or of one machine without."""
    gpus: int
    bytes_read: float
    bytes_stored: float

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together."""
        return self.clips / self.clips_per_second / 3600

    @property
    def hours(self) -> float:
        """From beginning to end, with all of them at work; starting Ray and loading models comes on top."""
        return self.gpu_hours / self.gpus


def run(config: Annotated[PlanConfig, Parameter(name="*")]) -> list[StagePlan]:
    """Say how long both stages will take, and what they read and store, from measured speeds.

    A small run on the hardware that you mean to use tells most: label a few shards, train an epoch, and give both as
    --measured. What is not given is measured on this machine, in the seconds that --seconds says, with the dataset's
    own clips, weights drawn at random, and nothing written. GPUs are taken to share the work evenly.

    Raises:
        PipelineError: the dataset or a measured run can't be read, or they don't fit.
    """
    manifest = read_manifest(config.data)
    if not len(manifest):
        raise UsageError(f"--data {config.data}: holds no clips, so there is nothing to plan")
    kinds = [(place, kind_of(place)) for place in config.measured]
    if wrong := [place for place, kind in kinds if kind == "dataset"]:
        raise UsageError(f"--measured {wrong[0]}: is a dataset; give a logit store or a training run")
    store = _only([place for place, kind in kinds if kind == "store"])
    run_before = _only([place for place, kind in kinds if kind == "run"])
    plans = []
    if config.teacher or store:
        plans.append(_plan_labelling(config, manifest, store))
    epoch = _plan_epoch(config, manifest, run_before)
    plans += [epoch, _whole_training(config, epoch)]
    print_table(_table(plans, config.price))
    if not plans[0].title.startswith("stage 1"):
        print_line("stage 1 is left out: give --teacher, or a store as --measured")
    return plans


def _only(places: list[str]) -> str | None:
    if len(places) > 1:
        raise UsageError(f"--measured {places[1]}: is the second of its kind; give one store and one run at most")
    return places[0] if places else None


def _plan_labelling(config: PlanConfig, manifest: Manifest, store_before: str | None) -> StagePlan:
    clips, specs = len(manifest), parse_teachers(config.teacher)
    clip_bytes = _FLOAT16_BYTES * len(manifest.vocabulary) + len(manifest.clip_ids[0].as_py())  # before compression
    if store_before is not None:
        store, speed = open_store(store_before), read_speed(store_before)
        if speed is None:
            raise UsageError(
                f"--measured {store_before}: it does not say how fast it was made. Label a few shards with this version"
            )
        _check_teachers(config, store)
        clip_bytes, rate = store.size / max(store.clip_count, 1), speed.clips_per_second
    else:
        device = choose_device(config.device)
        _log.info("measuring the teachers on %s for %g s", device, config.seconds)
        speed = measure_labelling(
            specs,
            manifest,
            device=device,
            precision=fastest_precision(device),
            batch_size=BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"]),
            seconds=config.seconds,
        )
        rate = speed.clips_per_second
    return StagePlan(
        title="stage 1, all clips once",
        clips=clips,
        clips_per_second=rate,
        gpus=config.gpus,
        bytes_read=float(manifest.sizes.sum()),
        bytes_stored=clips * clip_bytes,
    )


def _check_teachers(config: PlanConfig, store: LogitStore) -> None:
    aliases = {alias: facts["name"] for facts in model_facts("teacher") for alias in facts["aliases"]}
    asked = sorted(aliases.get(spec.name, spec.name) for spec in parse_teachers(config.teacher))
    found = sorted(teacher.name for teacher in store.stamp.teachers)
    if asked and asked != found:
        raise UsageError(
            f"--measured {store.location}: was made by {', '.join(found)}, not by {', '.join(asked)}. Measure with the "
            "same teachers, or leave --teacher out"
        )


def _plan_epoch(config: PlanConfig, manifest: Manifest, run_before: str | None) -> StagePlan:
    model, batch_size = config.model or "mn10", config.batch_size
    if run_before is not None:
        settings = summarise_run(run_before).settings
        found, batch_size = settings.get("model", model), settings.get("batch_size", batch_size)
        if config.model is not None and config.model != found:
            raise UsageError(
                f"--measured {run_before}: trained {found}, not {config.model}. Measure with the same model, or leave "
                "--model out"
            )
        model, rate = found, speed_of_run(run_before)
    else:
        rate = _measure_training(config, manifest, model)
    weights = sampling_weights(manifest)
    bytes_of_drawn = float(np.average(manifest.sizes, weights=weights if weights.any() else None))
    drawn = min(config.clips_per_epoch, len(manifest))
    clips = max(drawn // batch_size, 1) * min(batch_size, drawn)  # an epoch has whole batches
    return StagePlan(
        title=f"stage 2, an epoch of {model}",
        clips=clips,
        clips_per_second=rate,
        gpus=config.gpus,
        bytes_read=clips * bytes_of_drawn + _FLOAT16_BYTES * len(manifest.vocabulary) * len(manifest),
        bytes_stored=_run_bytes(model),
    )


def _measure_training(config: PlanConfig, manifest: Manifest, model: str) -> float:
    device = choose_device(config.device)
    _log.info("measuring %s in training on %s for %g s", model, device, config.seconds)
    settings = TrainingConfig(
        data=config.data, run="", batch_size=min(config.batch_size, len(manifest)), channels_last=True
    )
    built = build_for_training(student, model, None, seed=0, num_classes=len(manifest.vocabulary))
    learner = StudentLearner(built, student.DistillConfig(), student.MixupConfig(), student.AugmentConfig())
    return measure_training(settings, learner, manifest, device=device, seconds=config.seconds)


def _run_bytes(model: str) -> float:
    """Returns the size of a run's folder: two checkpoints of weights and Adam's two moments, and two weights' files."""
    parameters = next((facts["parameters"] for facts in model_facts("student") if facts["name"] == model), 0)
    return _FLOAT32_BYTES * parameters * (2 * 3 + 2)


def _whole_training(config: PlanConfig, epoch: StagePlan) -> StagePlan:
    return StagePlan(
        title=f"stage 2, {config.epochs} epochs",
        clips=config.epochs * epoch.clips,
        clips_per_second=epoch.clips_per_second,
        gpus=config.gpus,
        bytes_read=config.epochs * epoch.bytes_read,
        bytes_stored=epoch.bytes_stored,
    )


def _table(plans: list[StagePlan], price: float | None) -> Table:
    table = Table("", *(plan.title for plan in plans))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "clips": [f"{plan.clips:,}" for plan in plans],
        "clips/s of each": [f"{plan.clips_per_second:,.2f}" for plan in plans],
        "GPUs, or machines without": [f"{plan.gpus}" for plan in plans],
        "hours": [_hours(plan.hours) for plan in plans],
        "GPU hours": [_hours(plan.gpu_hours) for plan in plans],
        "read": [_gigabytes(plan.bytes_read) for plan in plans],
        "stored, at most": [_gigabytes(plan.bytes_stored) for plan in plans],
    }
    if price is not None:
        rows["cost"] = [f"{price * plan.gpu_hours:,.2f}" for plan in plans]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
