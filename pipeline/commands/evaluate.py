"""`pipeline evaluate`: how well checkpoints, their ensemble and a logit store tag the clips of a dataset."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.vocabulary import read_vocabulary
from pipeline.errors import UsageError
from pipeline.logits.store import open_store
from pipeline.models.device import Precision, choose_device
from pipeline.models.loading import LoadedModel, load_model
from pipeline.runtime.output import print_line, print_table
from pipeline.runtime.ray_address import check_address
from pipeline.runtime.recipes import read_options
from pipeline.runtime.watching import PATIENCE_SECONDS
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.report import EvaluationReport, differences, score_table, write_report
from pipeline.scoring.scoring import System, ensemble, read_members, read_store, run_models, score, thresholds_of
from pipeline.scoring.thresholds import write_thresholds


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to score, on which clips."""

    data: str
    """Dataset to score on: a folder or URL with a manifest."""
    checkpoint: tuple[str, ...] = ()
    """Weights to score: files, URLs, or released models' names such as mn10_as, which are fetched once. NAME=FILE names
    the model in a file that does not say it. Several are also scored as an ensemble, the mean of their logits."""
    store: str | None = None
    """Logit store to score beside them, so that teachers and student share one table; each teacher too, where the store
    keeps the logits of each."""
    model: str | None = None
    """Registered name of the model in files that do not say it, such as mn10_as for a released file."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the models in such files, such as strides, se_dims or fmin, where they are not the name's."""
    classes: str | None = None
    """Class list of such files, in the format of AudioSet's class_labels_indices.csv; the dataset's unless given."""
    out: str | None = None
    """Folder that receives report.json and per_class.csv; without it only the table is shown."""
    thresholds: str | None = None
    """CSV that receives the probability of each class from which on a clip counts as having it so that F1 is highest on
    these clips, for `pipeline tag --thresholds`; of the ensemble where there are several checkpoints."""
    batch_size: int | None = None
    """Clips a forward pass, 1 or more; by default 64 on a GPU, 32 without one."""
    workers: int | None = None
    """Processes that read and decode, at most one a core; 0 decodes between the forward passes. By default one for each
    core where a GPU is fed, and up to 4 without one."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""
    precision: Precision = "float32"
    """What the networks compute in; front ends always compute in float32."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the clips that may be undecodable or missing from the store."""
    ranks: int = 1
    """Processes that share the clips, each with a GPU of its own where there are any, or a core. Above 1, Ray starts
    them, on this machine or a cluster's; without it one process scores, on the machine where it was started."""
    address: Annotated[str | None, Parameter(env_var="RAY_ADDRESS")] = None
    """Of the Ray cluster whose machines share the clips where there are `ranks`: HOST:PORT, or auto to find it."""
    patience: float = PATIENCE_SECONDS
    """Seconds that the ranks may be waited for without a sign of life."""
    resampling: Annotated[BootstrapConfig, Parameter(name="*")] = field(default_factory=BootstrapConfig)
    """How often the clips are resampled."""

    def __post_init__(self) -> None:
        if not self.checkpoint and self.store is None:
            raise UsageError("nothing to score: give --checkpoint, --store, or both")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; choose 1 or more")
        if self.ranks < 1:
            raise UsageError(f"ranks is {self.ranks}; choose 1 or more")
        if not self.patience > 0:
            raise UsageError(f"patience is {self.patience}; choose a number of seconds above 0")
        check_address(self.address)
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers is {self.workers}; choose 0 or more")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"max_failed is {self.max_failed}; choose a share from 0 to 1")


def run(config: Annotated[EvaluateConfig, Parameter(name="*")]) -> EvaluationReport:
    """Score checkpoints and a logit store on a dataset: mAP, ROC AUC, d', and each class's own metrics.

    All are scored on the same clips, those that every one of them has logits for; the report says how many those are,
    and gives a SHA-256 of their sorted ids, so that metrics from elsewhere can be compared. Classes that none of the
    clips carries are left out of the means, and counted.

    The interval beside each mAP tells how far other clips of the same kind could have moved it. The lines below the
    table tell what the first system is above each of the others, with the interval of that difference.

    Raises:
        PipelineError: a checkpoint, the store and the dataset don't fit, or too many clips have no logits.
    """
    manifest = read_manifest(config.data)
    systems: list[System] = []
    if config.store is not None:
        store = open_store(config.store)
        systems += [read_store(store, manifest), *read_members(store, manifest)]
    members = _run_models(config, manifest) if config.checkpoint else []
    systems += members
    if len(members) > 1:
        systems.append(ensemble(members))
    report = score(systems, manifest, max_failed=config.max_failed, resampling=config.resampling)
    print_table(score_table(report))
    for difference in differences(report.systems):
        print_line(str(difference))
    if config.thresholds is not None:
        write_thresholds(config.thresholds, thresholds_of(systems[-1], manifest), manifest.vocabulary)
        print_line(f"wrote {config.thresholds}, of {systems[-1].name}")
    if config.out is not None:
        for location in write_report(config.out, report):
            print_line(f"wrote {location}")
    return report


def _run_models(config: EvaluateConfig, manifest: Manifest) -> list[System]:
    if config.ranks > 1:
        from pipeline.scoring.ray_scoring import run_models_on_ray  # Ray takes seconds to import

        return run_models_on_ray(
            partial(_load_models, config),
            manifest,
            ranks=config.ranks,
            address=config.address,
            batch_size=config.batch_size,
            workers=config.workers,
            device=config.device,
            precision=config.precision,
            patience=config.patience,
        )
    device = choose_device(config.device)
    return run_models(
        _load_models(config, manifest, device),
        manifest,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        precision=config.precision,
    )


def _load_models(config: EvaluateConfig, manifest: Manifest, device: torch.device) -> list[LoadedModel]:
    options = read_options(config.model_options)
    classes = None if config.classes is None else read_vocabulary(config.classes)
    return [
        load_model(file, manifest, model=config.model, options=options, classes=classes, device=device)
        for file in config.checkpoint
    ]
