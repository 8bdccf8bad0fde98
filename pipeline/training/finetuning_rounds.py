"""The models of a published set's protocol, one after the other: prepared, trained, evaluated, summarised."""

import json
import logging
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.table import Table

from pipeline.dataset.manifest import MANIFEST_NAME, join_manifests, read_manifest
from pipeline.errors import UsageError
from pipeline.ingest.ingesting import IngestConfig, ingest
from pipeline.ingest.published_sets import PublishedSet, Round
from pipeline.ingest.sources import local_folder
from pipeline.models.device import choose_device, compute_in, training_precision
from pipeline.models.loading import load_model
from pipeline.runtime.output import print_table
from pipeline.runtime.progress import read_metrics
from pipeline.runtime.recipes import differences, to_toml
from pipeline.runtime.stopping import StopRequestedError, stop_on_signals
from pipeline.storage import files as storage
from pipeline.training.evaluation import Evaluation
from pipeline.training.finetuning import FinetuneConfig, FinetuneLearner, train_on
from pipeline.training.folder import BEST_NAME, CONFIG_NAME, FREE_SETTINGS, SUMMARY_NAME
from pipeline.training.ranks import Ranks
from pipeline.training.run import open_clips, start_pool

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSetConfig(FinetuneConfig):
    """A set as its publisher ships it, and how a student is fine-tuned on it."""

    data: str = ""
    """Folder for the set's parts as datasets, a path or a URL: made from --source where they are not there yet, with
    all of the sounds' bytes; RUN/data unless given."""
    source: str | None = None
    """The publisher's folder, local; needed once, to make --data."""
    eval_data: Annotated[str | None, Parameter(parse=False)] = None
    """The set says itself what is evaluated on."""
    only: tuple[str, ...] = ()
    """The rounds to do, such as fold1 fold2; all unless given. Machines can do one each, in a --run of their own."""

    @property
    def parts_folder(self) -> str:
        """Where the parts are."""
        return self.data or storage.join_path(self.run, "data")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """What was measured."""

    finished: bool
    """False where somebody stopped it; `--resume` goes on."""
    measure: str
    """The metric that the set's field reports: accuracy or mAP."""
    rounds: dict[str, dict[str, float]]
    """Round → its metrics."""

    @property
    def mean(self) -> float:
        """The mean of the measure over the rounds that are done, 0 to 1; NaN while none is."""
        return float(np.mean([metrics[self.measure] for metrics in self.rounds.values()])) if self.rounds else math.nan


def finetune(config: PublishedSetConfig, published: PublishedSet) -> FinetuneResult:
    """Train and judge the model of each round, and keep what was measured in the run's summary.json.

    Rounds that the summary has are skipped, and a round that was stopped goes on exactly where it was.

    Raises:
        PipelineError: the source, the settings or the checkpoint don't fit, or a run can't go on.
    """
    rounds = _chosen(config, published)
    _check_run(config)
    prepare(config, published, rounds)
    # The settings of the run as a whole; its rounds have theirs.
    storage.publish_bytes(storage.join_path(config.run, CONFIG_NAME), to_toml(config).encode())
    measure = "accuracy" if published.task == "single-label" else "mAP"
    for one in rounds:
        folder = storage.join_path(config.run, one.name)
        if one.name in _read_summary(config.run):
            _log.info("%s: is done", folder)
            continue
        _log.info("%s: learning from %s, evaluated on %s", folder, ", ".join(one.learn), one.watch)
        begun = bool(storage.list_tree(folder))
        manifest = join_manifests(config.parts_folder, one.learn)
        watched = join_manifests(config.parts_folder, [one.watch])
        trained = train_on(replace(config, run=folder, resume=begun), manifest, watched, published.task)
        if not trained.finished:
            return _conclude(config, published, measure, finished=False)
        metrics = _last_metrics(folder) if one.test is None else _test(config, published, folder, one.test)
        if metrics is None:
            return _conclude(config, published, measure, finished=False)
        best = {f"best_{measure}_on_{one.watch}": trained.best_score} if trained.best_score is not None else {}
        _write_summary(config, published, measure, {one.name: {**metrics, **best}})
    return _conclude(config, published, measure, finished=True)


def prepare(config: PublishedSetConfig, published: PublishedSet, rounds: list[Round]) -> None:
    """Make a dataset of each part that the rounds need and that is not there yet.

    Raises:
        UsageError: a part is not there, and there is no source to make it from, or a file of the source is missing.
        ManifestError: the source is malformed.
    """
    for part in sorted({part for one in rounds for part in one.parts}):
        out = storage.join_path(config.parts_folder, part)
        there = storage.exists(storage.join_path(out, MANIFEST_NAME))
        if there and config.source is None:
            continue
        if config.source is None:
            raise UsageError(f"{out}: is not there yet; give --source, the folder of {published.name}'s publisher")
        folder = published.find(local_folder(config.source, "--source"))
        source = published.source(folder, part)
        if not there:
            ingest(IngestConfig(out=out, name=f"{published.name}-{part}"), source)
        manifest = read_manifest(out)
        if manifest.vocabulary.sha256 != source.own_vocabulary().sha256:
            raise UsageError(f"{config.parts_folder}: {part} has other classes than --source; choose another folder")


def _chosen(config: PublishedSetConfig, published: PublishedSet) -> list[Round]:
    names = [one.name for one in published.rounds]
    if unknown := [name for name in config.only if name not in names]:
        raise UsageError(f"--only {unknown[0]}: {published.name} has the rounds {', '.join(names)}")
    return [one for one in published.rounds if not config.only or one.name in config.only]


def _check_run(config: PublishedSetConfig) -> None:
    """Check that the run may begin or go on.

    Raises:
        UsageError: the folder has a run and `resume` is off, or it was made with other settings.
    """
    location = storage.join_path(config.run, CONFIG_NAME)
    if storage.exists(location):
        if not config.resume:
            raise UsageError(f"--run {config.run}: holds a run. Add --resume to go on, or choose another folder")
        if changed := differences(storage.read_bytes(location).decode(), to_toml(config), free=FREE_SETTINGS):
            raise UsageError(f"--resume: {config.run} was made with other settings ({'; '.join(changed)}); use those")


def _last_metrics(run: str) -> dict[str, float]:
    """Returns what the last epoch's weights scored: where nothing else is left to test on, no epoch is picked by it."""
    evaluated = [line for line in read_metrics(run) if "eval/clips" in line]
    return {name.removeprefix("eval/"): value for name, value in evaluated[-1].items() if name.startswith("eval/")}


def _test(config: PublishedSetConfig, published: PublishedSet, run: str, part: str) -> dict[str, float] | None:
    """Score the best weights of a round on the part that it never saw; None where somebody asked for the end."""
    manifest = join_manifests(config.parts_folder, [part])
    device = choose_device(config.device)
    model = load_model(storage.join_path(run, BEST_NAME), manifest, device=device)
    precision = training_precision(config.precision, device)
    compute_in(precision, [model.network])
    evaluation = Evaluation(
        dataset=open_clips(config, manifest, model),
        score=FinetuneLearner(model.network, published.task, config).score,  # pyright: ignore[reportArgumentType]
        batch_size=config.batch_size,
        device=device,
        precision=precision,
        max_failed=config.max_failed,
        ranks=Ranks(),
    )
    with stop_on_signals() as stop, start_pool(config, device, stop) as pool:
        try:
            return evaluation.run(model.network, stop, evaluation.load(pool))
        except StopRequestedError:
            return None


def _read_summary(run: str) -> dict[str, dict[str, float]]:
    location = storage.join_path(run, SUMMARY_NAME)
    return json.loads(storage.read_bytes(location))["rounds"] if storage.exists(location) else {}


def _write_summary(
    config: PublishedSetConfig, published: PublishedSet, measure: str, new: dict[str, dict[str, float]]
) -> None:
    done = {**_read_summary(config.run), **new}
    names = [one.name for one in published.rounds]
    values = [done[name][measure] for name in names if name in done]
    summary: dict[str, Any] = {
        "set": published.name,
        "task": published.task,
        "model": config.model,
        "measure": measure,
        "mean": float(np.mean(values)),
        "rounds": {name: done[name] for name in names if name in done},
        "missing": [name for name in names if name not in done],
    }
    content = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    storage.publish_bytes(storage.join_path(config.run, SUMMARY_NAME), content.encode())


def _conclude(config: PublishedSetConfig, published: PublishedSet, measure: str, *, finished: bool) -> FinetuneResult:
    result = FinetuneResult(finished=finished, measure=measure, rounds=_read_summary(config.run))
    table = Table(f"{published.name}, {config.model}", measure, "clips")
    for name, metrics in result.rounds.items():
        table.add_row(name, f"{metrics[measure]:.4f}", f"{metrics['clips']:,.0f}")
    if len(result.rounds) > 1:
        table.add_row(f"mean of {len(result.rounds)} of {len(published.rounds)}", f"{result.mean:.4f}", "")
    print_table(table)
    if not finished:
        _log.warning("stopped; the same command with --resume goes on")
    return result
