"""Finished runs and their teachers, scored on the same clips: what a comparison prints and a report shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.logits.stamp import StoreStamp
from pipeline.logits.store import open_store
from pipeline.models.device import choose_device
from pipeline.models.loading import LoadedModel, load_model
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.report import EvaluationReport, SystemScores
from pipeline.scoring.scoring import System, read_store, run_models, score
from pipeline.training.folder import finished_weights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredRuns:
    """Runs, the teachers' store where there is one, and what both say about a dataset's clips."""

    manifest: Manifest
    runs: tuple[str, ...]
    """Their folders."""
    models: tuple[LoadedModel, ...]
    """One a run."""
    stamp: StoreStamp | None
    """Of the store."""
    systems: tuple[System, ...]
    """The store first, where there is one, then one a run."""
    report: EvaluationReport
    """Their scores, in the same order."""

    @property
    def teachers(self) -> SystemScores | None:
        """The store's scores."""
        return None if self.stamp is None else self.report.systems[0]

    @property
    def students(self) -> tuple[SystemScores, ...]:
        """The runs' scores."""
        return self.report.systems[-len(self.runs) :]


def score_runs(
    runs: Sequence[str],
    *,
    data: str,
    store: str | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
    max_failed: float,
    resampling: BootstrapConfig,
) -> ScoredRuns:
    """Score runs by their best weights, or their last where nothing was evaluated, as `pipeline evaluate` does.

    Args:
        runs: folders or URLs.
        data: the dataset.
        store: the teachers' logits of its clips.
        batch_size: clips a forward pass; None is what the device likes.
        workers: decoding processes; 0 decodes in this one, None is what feeds the device.
        device: `auto`, or torch's name of one.
        max_failed: largest share, 0 to 1, of the clips that may have no logits.
        resampling: how often the clips are resampled.

    Raises:
        PipelineError: a folder holds no finished run, or the runs, the store and the dataset don't fit.
    """
    manifest = read_manifest(data)
    chosen = choose_device(device)
    models = [load_model(finished_weights(run), manifest, device=chosen) for run in runs]
    opened = None if store is None else open_store(store)
    systems = [] if opened is None else [read_store(opened, manifest)]
    systems += run_models(models, manifest, batch_size=batch_size, workers=workers, device=chosen, precision="float32")
    return ScoredRuns(
        manifest=manifest,
        runs=tuple(runs),
        models=tuple(models),
        stamp=None if opened is None else opened.stamp,
        systems=tuple(systems),
        report=score(systems, manifest, max_failed=max_failed, resampling=resampling),
    )
