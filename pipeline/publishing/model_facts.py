"""What is known of a model that is to be published: from its file, its run's settings, its store, its evaluation."""

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import student
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import CheckpointError, PipelineError, UsageError
from pipeline.logits.store import open_store
from pipeline.models.loading import LoadedModel
from pipeline.redaction import redact
from pipeline.runtime.recipes import flat_settings
from pipeline.scoring.report import hash_of_ids
from pipeline.storage import files as storage
from pipeline.training.folder import CONFIG_NAME

_LOCATIONS = ("data", "store", "eval_data", "source", "checkpoint")
"""Settings that name places of one machine: their last part is enough for others."""
_LOCAL = frozenset(
    {"run", "resume", "device", "ranks", "address", "workers", "patience", "cache", "cache_size", "cache_audio"}
    | {"log_every", "checkpoint_minutes", "keep_checkpoints", "only"}
)
"""Settings that say nothing of the weights."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """A dataset that a model learned from, or was scored on."""

    name: str
    clips: int
    ids_sha256: str
    """As `pipeline.scoring.report.hash_of_ids` gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFacts:
    """A member of the ensemble that a student learned from."""

    name: str
    weight: float
    sha256: str
    licence: str
    """Of its weights, as its release states it; empty where it is not known."""
    paper: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `pipeline evaluate` or `compare` found."""

    data: DataFacts
    classes_scored: int
    metrics: Mapping[str, float]
    """mAP, roc_auc, d_prime, and accuracy where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a card says of a model; what is not known is empty or None."""

    name: str
    model: LoadedModel
    stage: Literal["student", "teacher"]
    licence: str
    """Of the weights, an SPDX identifier."""
    paper: str
    parameters: int
    macs: int | None
    """Multiply-accumulates of one clip of the model's input length; of transformers half their FLOPs."""
    training: DataFacts | None
    teachers: tuple[TeacherFacts, ...]
    recipe: Mapping[str, Any]
    """The run's settings, those that say something about the weights."""
    evaluation: Evaluation | None

    @property
    def network(self) -> Any:
        """The model's network: a `student.Tagger` or a `teacher.AudioTransformer`."""
        return self.model.network


def gather_facts(
    name: str,
    model: LoadedModel,
    *,
    run: str | None,
    licence: str | None,
    data: str | None,
    store: str | None,
    evaluation: str | None,
) -> ModelFacts:
    """Returns what is known.

    Args:
        name: what the model is to be called.
        model: not fused.
        run: the folder of the run that it comes from.
        licence: of the weights; None is that of the release, where the weights are a release's own.
        data: the dataset that it learned from; None is what the run says, if that can still be read.
        store: likewise of the teachers' logits.
        evaluation: report.json of `pipeline evaluate --out` or `compare`, or the folder that holds it.

    Raises:
        PipelineError: what was named can't be read, or the evaluation is of other weights.
    """
    recipe = {} if run is None else _recipe_of(run)
    stage = "student" if isinstance(model.network, student.Tagger) else "teacher"
    card = _card_of(stage, model.model_name)
    return ModelFacts(
        name=name,
        model=model,
        stage=stage,
        licence=licence or (card.licence if card is not None and run is None and _is_release(model) else ""),
        paper="" if card is None else card.paper,
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        macs=_macs_of(stage, model, card),
        training=_data_facts(data or recipe.get("data"), required=data is not None),
        teachers=_teachers_of(store or recipe.get("store"), required=store is not None),
        recipe=_told_to_others(recipe),
        evaluation=None if evaluation is None else _evaluation_of(evaluation, model.sha256),
    )


def _recipe_of(run: str) -> dict[str, Any]:
    location = storage.join_path(run, CONFIG_NAME)
    return flat_settings(tomllib.loads(storage.read_bytes(location).decode())) if storage.exists(location) else {}


def _told_to_others(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: redact(storage.file_name(str(value))) if key in _LOCATIONS else value
        for key, value in recipe.items()
        if key not in _LOCAL
    }


def _card_of(stage: str, name: str) -> Any:
    import teacher

    try:
        return (student if stage == "student" else teacher).model_card(name)
    except ValueError:
        return None


def _is_release(model: LoadedModel) -> bool:
    return model.source.startswith("https://")


def _macs_of(stage: str, model: LoadedModel, card: Any) -> int | None:
    import teacher

    if stage == "student":
        assert isinstance(model.network, student.Tagger)
        return student.count_complexity(model.network).macs
    return None if card is None else teacher.count_complexity(card).flops // 2


def _data_facts(location: str | None, *, required: bool) -> DataFacts | None:
    if location is None:
        return None
    try:
        manifest = read_manifest(location)
    except PipelineError as error:
        if required:
            raise
        _log.warning("the card can't say what the model learned from; name it with --data: %s", error)
        return None
    name = redact(storage.file_name(location.rstrip("/")))
    return DataFacts(name=name, clips=len(manifest), ids_sha256=hash_of_ids(manifest.clip_ids))


def _teachers_of(location: str | None, *, required: bool) -> tuple[TeacherFacts, ...]:
    if location is None:
        return ()
    try:
        stamp = open_store(location).stamp
    except PipelineError as error:
        if required:
            raise
        _log.warning("the card can't name the teachers; name their store with --store: %s", error)
        return ()
    return tuple(teacher_facts(one.name, one.weight, one.sha256) for one in stamp.teachers)


def teacher_facts(name: str, weight: float, sha256: str) -> TeacherFacts:
    """Returns what the registry knows of a store's teacher beside its stamp."""
    card = _card_of("teacher", name)
    licence, paper = ("", "") if card is None else (card.licence, card.paper)
    return TeacherFacts(name=name, weight=weight, sha256=sha256, licence=licence, paper=paper)


def _evaluation_of(location: str, weights_sha256: str) -> Evaluation:
    path = location if location.endswith(".json") else storage.join_path(location, "report.json")
    try:
        report = json.loads(storage.read_bytes(path))
        systems: Sequence[Mapping[str, Any]] = report["systems"]
        own = [system for system in systems if system["sha256"] == weights_sha256]
        if not own:
            names = ", ".join(str(system["name"]) for system in systems)
            raise CheckpointError(
                f"{path}: is of {names}, none of which has these weights (sha256 {weights_sha256[:12]}). Evaluate them "
                "with `pipeline evaluate --checkpoint … --out FOLDER`"
            )
        metrics = {key: own[0].get(key) for key in ("mAP", "roc_auc", "d_prime", "accuracy")}
        return Evaluation(
            data=DataFacts(
                name=storage.file_name(str(report["data"]).rstrip("/")),
                clips=int(report["clips"]),
                ids_sha256=str(report["clip_ids_sha256"]),
            ),
            classes_scored=int(report["classes_scored"]),
            metrics={key: float(value) for key, value in metrics.items() if value is not None},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is no report.json of `pipeline evaluate --out` ({error!r})") from error
