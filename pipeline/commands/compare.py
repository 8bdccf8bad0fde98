"""`pipeline compare`: what distillation brought. Runs and their teachers in one table, one picture and one page."""

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.pages.documents import EXTRA, NEEDED
from pipeline.pages.report_page import ReportLimits, report_page
from pipeline.pages.scored_runs import score_runs
from pipeline.runtime.extras import missing_packages
from pipeline.runtime.output import print_line, print_table
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.pictures import read_curves, training_picture
from pipeline.scoring.report import EvaluationReport, differences, score_table, write_report
from pipeline.storage import files as storage

PICTURE_NAME, PAGE_NAME = "comparison.png", "report.html"


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
    """Folder that receives comparison.png, report.json, per_class.csv and, with the extra `report`, report.html."""
    batch_size: int | None = None
    """Clips a forward pass, 1 or more; by default 64 on a GPU, 32 without one."""
    workers: int | None = None
    """Processes that read and decode, at most one a core; 0 decodes between the forward passes. By default one for each
    core where a GPU is fed, and up to 4 without one."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes a GPU where there is one."""
    max_failed: float = 0.01
    """Largest share, 0 to 1, of the clips that may be undecodable or missing from the store."""
    resampling: Annotated[BootstrapConfig, Parameter(name="*")] = field(default_factory=BootstrapConfig)
    """How often the clips are resampled."""

    def __post_init__(self) -> None:
        positive = self.batch_size is None or self.batch_size >= 1
        if not positive or (self.workers or 0) < 0 or not 0 <= self.max_failed <= 1:
            raise UsageError("batch_size must be 1 or more, workers 0 or more, max_failed a share from 0 to 1")


def run(config: Annotated[CompareConfig, Parameter(name="*")]) -> EvaluationReport:
    """Score finished runs and their teachers on the same clips, and draw how the runs went.

    The picture shows each run's training loss and mAP by step, and each class's average precision beside the
    teachers'. Scores are those of `pipeline evaluate`; the page is that of `pipeline report`. A line says whether the
    first run is above each of the others by more than the choice of evaluation clips explains.

    Raises:
        PipelineError: a folder holds no finished run, or the runs, the store and the dataset don't fit.
    """
    scored = score_runs(
        config.run,
        data=config.data,
        store=config.store,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
        max_failed=config.max_failed,
        resampling=config.resampling,
    )
    report = scored.report
    picture, page = (storage.join_path(config.out, name) for name in (PICTURE_NAME, PAGE_NAME))
    training_picture(
        picture,
        runs=[read_curves(run, system.name) for run, system in zip(config.run, scored.students, strict=True)],
        students=scored.students,
        teachers=scored.teachers,
        class_names=report.class_names,
        positives=report.positives,
    )
    print_table(score_table(report))
    for difference in differences(scored.students):
        print_line(str(difference))
    for location in (*write_report(config.out, report), picture):
        print_line(f"wrote {location}")
    if missing := missing_packages(*NEEDED, extra=EXTRA):
        print_line(f"left out {page}, which needs {missing}")
    else:
        storage.publish_bytes(page, report_page(scored, ReportLimits()))
        print_line(f"wrote {page}")
    return report
