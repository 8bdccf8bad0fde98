"""`pipeline compare`: what distillation brought. Runs and their teachers in one table and one picture."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.logits.store import open_store
from pipeline.models.device import choose_device
from pipeline.models.loading import load_model
from pipeline.runtime.output import print_line, print_table
from pipeline.scoring.pictures import read_curves, training_picture
from pipeline.scoring.report import EvaluationReport, score_table, write_report
from pipeline.scoring.scoring import System, read_store, run_models, score
from pipeline.storage import files as storage
from pipeline.training.folder import finished_weights

PICTURE_NAME = "comparison.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Which runs, on which clips."""

    run: tuple[str, ...]
    """Folders or URLs of finished runs; each is scored by its best weights, or its last where nothing was evaluated."""
    data: str
    """Dataset to score on: a folder or URL with a manifest."""
    store: str | None = None
    """Logit store of the teachers on that dataset, to score beside the runs."""
    out: str
    """Folder that receives comparison.png, report.json and per_class.csv."""
    batch_size: int = 32
    """Clips a forward pass, 1 or more."""
    workers: int = 2
    """Processes that read and decode; 0 decodes between the forward passes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the clips that may be undecodable or missing from the store."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0 or not 0 <= self.max_failed <= 1:
            raise UsageError("batch_size must be 1 or more, workers 0 or more, max_failed a share from 0 to 1")


def run(config: Annotated[CompareConfig, Parameter(name="*")]) -> EvaluationReport:
    """Score finished runs and their teachers on the same clips, and draw how the runs went.

    The picture shows each run's training loss and mAP by epoch, and each class's average precision beside the
    teachers'. Scores are those of `pipeline evaluate`.

    Raises:
        PipelineError: a folder holds no finished run, or the runs, the store and the dataset don't fit.
    """
    manifest = read_manifest(config.data)
    device = choose_device(config.device)
    weights = [finished_weights(folder) for folder in config.run]
    models = [load_model(path, manifest, device=device) for path in weights]
    systems: list[System] = [] if config.store is None else [read_store(open_store(config.store), manifest)]
    systems += run_models(
        models,
        manifest,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        precision="float32",
    )
    report = score(systems, manifest, max_failed=config.max_failed)
    teachers, students = report.systems[: -len(weights)], report.systems[-len(weights) :]
    picture = storage.join_path(config.out, PICTURE_NAME)
    training_picture(
        picture,
        runs=[read_curves(folder, system.name) for folder, system in zip(config.run, students, strict=True)],
        students=students,
        teachers=teachers[0] if teachers else None,
        class_names=report.class_names,
        positives=report.positives,
    )
    print_table(score_table(report))
    for location in (*write_report(config.out, report), picture):
        print_line(f"wrote {location}")
    return report
