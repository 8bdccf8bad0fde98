"""`pipeline report`: what runs learned, as one HTML file that opens without a network."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.pages.documents import EXTRA, NEEDED
from pipeline.pages.report_page import ReportLimits, report_page
from pipeline.pages.scored_runs import score_runs
from pipeline.runtime.extras import check_packages
from pipeline.runtime.output import print_line, print_table
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.report import EvaluationReport, score_table
from pipeline.storage import files as storage


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Which runs, on which clips."""

    run: tuple[str, ...]
    """Folders or URLs of finished runs; each is scored by its best weights, or its last where nothing was evaluated.
    The clips shown are those that the first is most wrong about."""
    _: KW_ONLY
    data: str
    """Dataset to score on: a folder or URL with a manifest."""
    store: str | None = None
    """Logit store of the teachers on that dataset, to show beside the runs."""
    out: str = "report.html"
    """The file to write, a path or URL."""
    limits: Annotated[ReportLimits, Parameter(name="*")] = field(default_factory=ReportLimits)
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


def run(config: Annotated[ReportConfig, Parameter(name="*")]) -> EvaluationReport:
    """Write what runs learned as one HTML file: for a browser, without a network.

    It shows the training's curves, each class's average precision with its precision-recall curve and its gain over
    another run, calibration, the clips that the first run is most wrong about with their sounds, settings and hashes.

    Raises:
        PipelineError: jinja2 is missing, a folder holds no finished run, or the runs, the store and the dataset don't
            fit.
    """
    check_packages("report", *NEEDED, extra=EXTRA)
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
    page = report_page(scored, config.limits)
    storage.publish_bytes(config.out, page)
    print_table(score_table(scored.report))
    print_line(f"wrote {config.out}, {len(page) / 1e6:.1f} MB")
    return scored.report
