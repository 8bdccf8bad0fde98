"""A training run from its start, or from where it stopped, to its end: logs, evaluates and saves as it goes."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.alignment import AlignedLogits
from pipeline.cache import ShardMirror
from pipeline.errors import (
    CheckpointError,
    StorageUnavailableError,
    TooManyFailuresError,
    TrainingDivergedError,
    UsageError,
)
from pipeline.join import FailureTally, JoinedDataset, TrainingBatch, batch_loader
from pipeline.manifest import Manifest
from pipeline.memory import keep_freed_memory
from pipeline.predictions import choose_device, predict
from pipeline.progress import MetricLog, ProgressBar, progress_bar
from pipeline.run_folder import BEST_NAME, LAST_NAME, RunFolder
from pipeline.sampling import EpochPlan, StreamPlan, plan_epochs
from pipeline.stopping import StopRequest, StopRequestedError, stop_on_signals
from pipeline.streaming import load_steps
from pipeline.training import Learner, StepReport, Trainer, TrainingConfig
from pipeline.waveform_cache import WaveformCache

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    finished: bool
    """False where somebody stopped it; `--resume` goes on."""
    steps: int
    best_map: float | None
    """Best mAP on the evaluation clips, 0 to 1; None where nothing was evaluated."""


class Listener(Protocol):
    """What a model says about the sounds it takes."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of its waveforms."""
        ...

    @property
    def input_seconds(self) -> float:
        """Length of its waveforms."""
        ...


def open_clips(
    config: TrainingConfig, manifest: Manifest, model: Listener, logits: AlignedLogits | None = None
) -> JoinedDataset:
    """Join a dataset's clips with logits, in the form that `model` hears them in.

    Raises:
        UsageError: decoded audio is to be kept, but the disk has no room for it.
    """
    rate, seconds, cache = model.sample_rate_hz, model.input_seconds, None
    folder = config.cache_folder()
    if config.cache_audio:
        samples = round(rate * seconds)
        cache = WaveformCache(folder, manifest, sample_rate_hz=rate, samples=samples)
    mirror = ShardMirror(folder, manifest.location)
    return JoinedDataset(manifest, sample_rate_hz=rate, seconds=seconds, logits=logits, cache=cache, mirror=mirror)


def run_training(
    config: TrainingConfig,
    learner: Learner,
    *,
    dataset: JoinedDataset,
    eval_dataset: JoinedDataset | None,
    schedule: Callable[[int], float],
    made: Mapping[str, Any],
    export_dtype: torch.dtype = torch.float32,
) -> RunResult:
    """Start or resume the run that the settings describe, and train until it is done or stopped.

    Args:
        config: the settings.
        learner: the model and its loss.
        dataset: the clips to learn from.
        eval_dataset: the clips to be judged on, if any.
        schedule: epoch → what the learning rate is multiplied by.
        made: stage, model and kwargs, from which the files of weights say what they hold.
        export_dtype: of the numbers in those files.

    Raises:
        PipelineError: the settings don't fit the folder or the dataset, or the run can't go on.
    """
    manifest = dataset.manifest
    if eval_dataset is not None and eval_dataset.manifest.vocabulary.sha256 != manifest.vocabulary.sha256:
        raise UsageError(f"--eval-data {config.eval_data}: has other classes than --data {config.data}")
    plan = plan_epochs(
        manifest,
        sampling=config.sampling,
        batch_size=config.batch_size,
        clips_per_epoch=config.clips_per_epoch,
        seed=config.seed,
        read_window=config.read_window,
        stream=config.stream,
    )
    folder = RunFolder(config)
    state = folder.newest_state()
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    trainer = Trainer(learner, config, plan, schedule, device)
    _log.info("%d epochs of %d steps of %d clips on %s", config.epochs, plan.steps_per_epoch, config.batch_size, device)
    if never := np.count_nonzero(plan.weights == 0):
        _log.warning("%d of %d clips have no labels: balanced sampling never draws them", never, len(manifest))
    if isinstance(plan, StreamPlan):
        _log.info(
            "an epoch streams 1/%d of the shards; %.1f %% of what it reads is thrown away",
            plan.epochs_per_pass,
            100 * plan.thrown_away,
        )
    run = TrainingRun(
        config,
        folder,
        state,
        trainer=trainer,
        plan=plan,
        learner=learner,
        dataset=dataset,
        eval_dataset=eval_dataset,
        device=device,
        metadata={
            **made,
            "classes": len(manifest.vocabulary),
            "vocabulary_sha256": manifest.vocabulary.sha256,
            "vocabulary": manifest.vocabulary.to_csv_bytes().decode(),
        },
        export_dtype=export_dtype,
    )
    try:
        return run.go()
    finally:
        folder.close()


@dataclass(kw_only=True, slots=True)
class _EpochFigures:
    """Sums over the steps of an epoch, and how this process's time went."""

    loss: float = 0.0
    clips: int = 0
    started: float = field(default_factory=time.monotonic)
    clips_here: int = 0
    waited: float = 0.0

    def add(self, report: StepReport) -> None:
        self.loss += report.loss * report.clips
        self.clips += report.clips
        self.clips_here += report.clips

    def values(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {
            "epoch/loss": self.loss / max(self.clips, 1),
            "epoch/clips_per_second": self.clips_here / seconds,
            "epoch/data_wait_share": self.waited / seconds,
        }

    def state_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "clips": self.clips}


def _in_words(values: Mapping[str, float]) -> str:
    text = f"loss {values['epoch/loss']:.4f}, {values['epoch/clips_per_second']:.1f} clips/s"
    text += f", {100 * values['epoch/data_wait_share']:.0f} % of the time waiting for data"
    return text + (
        f", mAP {values['eval/mAP']:.4f} on {values['eval/clips']:.0f} clips" if "eval/mAP" in values else ""
    )


class TrainingRun:
    """One run: a trainer, the folder that it is kept in, and what was measured so far.

    Args:
        config: the settings.
        folder: the run's.
        state: to go on from; None starts anew.
        trainer: the model in training.
        plan: which clips each step sees.
        learner: judges predictions.
        dataset: the clips to learn from.
        eval_dataset: the clips to be judged on, if any.
        device: where the model is.
        metadata: goes into the headers of the weights' files.
        export_dtype: of the numbers in those files.

    Raises:
        CheckpointError: the state belongs to another model or dataset.
    """

    _metrics: MetricLog
    _bar: ProgressBar

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        state: Mapping[str, Any] | None,
        *,
        trainer: Trainer,
        plan: EpochPlan,
        learner: Learner,
        dataset: JoinedDataset,
        eval_dataset: JoinedDataset | None,
        device: torch.device,
        metadata: Mapping[str, Any],
        export_dtype: torch.dtype,
    ) -> None:
        self._config, self._folder = config, folder
        self._trainer, self._plan, self._learner = trainer, plan, learner
        self._dataset, self._eval_dataset, self._device, self._metadata = dataset, eval_dataset, device, metadata
        self._export_dtype = export_dtype
        self._tally = FailureTally(dataset.manifest, most=config.max_failed)
        self._epochs_closed = 0
        self._epoch = _EpochFigures()
        self._best_map: float | None = None
        self._metric_lines = 0
        self._failures_reported = 0
        self._batch: TrainingBatch | None = None
        self._saved_at = time.monotonic()
        self._saved_path: Path | None = None
        if state is not None:
            self._restore(state)

    def go(self) -> RunResult:
        """Train to the end, or until Ctrl-C or SIGTERM; either way all is saved.

        Raises:
            TrainingDivergedError: a loss or a gradient is not finite.
            TooManyFailuresError: too many clips can't be read; what was learned is saved.
        """
        total = self._config.epochs * self._plan.steps_per_epoch
        if self._trainer.step >= total and self._epochs_closed >= self._config.epochs:
            folder, done = self._folder.path, self._epochs_closed
            _log.info("%s is finished: %d epochs are done. Raise --epochs to go on", folder, done)
            return self._result(finished=True)
        self._folder.begin()
        batch = self._config.batch_size
        with (
            stop_on_signals() as stop,
            MetricLog(self._folder.path, kept_lines=self._metric_lines, after_step=self._trainer.step) as log,
            progress_bar("training", total * batch, done=self._trainer.step * batch) as bar,
        ):
            self._metrics, self._bar = log, bar
            try:
                self._train(total, stop)
            except StopRequestedError:
                self._save()
                _log.warning("stopped after step %d of %d; --resume goes on", self._trainer.step, total)
                return self._result(finished=False)
            except (TooManyFailuresError, StorageUnavailableError):
                self._save()
                raise
            self._save()
        return self._result(finished=True)

    def _train(self, total: int, stop: StopRequest) -> None:
        if self._trainer.step == (self._epochs_closed + 1) * self._plan.steps_per_epoch:
            self._close_epoch(stop)  # it was stopped while its last epoch was evaluated
        loader = load_steps(
            self._dataset,
            self._plan,
            first_step=self._trainer.step,
            end_step=total,
            workers=self._config.workers,
            pin_memory=self._device.type == "cuda",
        )
        try:
            for report in self._trainer.steps(self._accounted(stop.guard(loader))):
                self._record(report)
                if report.ends_epoch:
                    self._close_epoch(stop)
                if time.monotonic() - self._saved_at >= 60 * self._config.checkpoint_minutes:
                    self._save()
        except FloatingPointError as error:
            raise self._diverged(error) from error

    def _accounted(self, loader: Iterable[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Pass batches on; count failed clips and the time spent waiting."""
        asked = time.monotonic()
        for batch in loader:
            self._epoch.waited += time.monotonic() - asked
            self._tally.add(batch)
            self._batch = batch
            yield batch
            asked = time.monotonic()

    def _record(self, report: StepReport) -> None:
        self._epoch.add(report)
        note = f"epoch {report.epoch + 1}/{self._config.epochs} loss {report.loss:.4f}"
        self._bar.advance(self._config.batch_size, note=note)
        if report.step % self._config.log_every == 0:
            values = {
                "train/loss": report.loss,
                "train/gradient_norm": report.gradient_norm,
                "train/learning_rate": report.learning_rate,
            }
            self._metrics.write(report.step, values, epoch=report.epoch)

    def _close_epoch(self, stop: StopRequest) -> None:
        """Evaluate, write the epoch's figures and start the next one. Only then does a checkpoint count it as done."""
        epoch, epochs = self._epochs_closed, self._config.epochs
        values = self._epoch.values()
        is_last = epoch + 1 == epochs
        if self._eval_dataset is not None and (is_last or (epoch + 1) % self._config.evaluate_every == 0):
            values |= {f"eval/{name}": value for name, value in self._evaluate(self._eval_dataset, stop).items()}
        self._metrics.write(self._trainer.step, values, epoch=epoch)
        _log.info("epoch %d/%d: %s", epoch + 1, epochs, _in_words(values))
        self._epochs_closed += 1
        self._epoch = _EpochFigures()
        if (new_map := values.get("eval/mAP", math.nan)) > (self._best_map or -1.0):
            self._best_map = new_map
            self._save_weights(BEST_NAME)
        self._report_failures()

    def _evaluate(self, dataset: JoinedDataset, stop: StopRequest) -> dict[str, float]:
        config, clips = self._config, len(dataset.manifest)
        self._bar.advance(0, note=f"evaluating on {clips} clips")
        rows = np.array_split(np.arange(clips), max(1, math.ceil(clips / config.batch_size)))
        loader = batch_loader(dataset, rows, workers=min(config.workers, len(rows)))
        tally = FailureTally(dataset.manifest, most=config.max_failed)

        def counted() -> Iterator[TrainingBatch]:
            for batch in stop.guard(loader):
                tally.add(batch)
                yield batch

        model = self._trainer.trained_model
        found = predict([model], counted(), device=self._device, precision=config.precision)
        tally.check()
        labels = dataset.manifest.label_matrix(found.rows)  # (clips, classes)
        return {**self._learner.score(found.logits[0], labels), "clips": float(len(found.rows))}

    def _report_failures(self) -> None:
        failures = self._tally.failures
        if len(failures) > self._failures_reported:
            self._failures_reported = len(failures)
            path = self._folder.list_failures(failures)
            _log.warning("%s; listed in %s", self._tally.summary(), path)
        self._tally.check()

    def _diverged(self, error: FloatingPointError) -> TrainingDivergedError:
        assert self._batch is not None
        clip_ids = ", ".join(self._tally.clip_id(int(row)) for row in self._batch.rows)
        good = self._saved_path or "there is none yet"
        return TrainingDivergedError(
            f"step {self._trainer.step + 1}: {error}. The clips of the batch: {clip_ids}. The last good checkpoint: "
            f"{good}. Try a lower --learning-rate, --optimizer.most-gradient-norm 1 or --precision float32"
        )

    def _save(self) -> None:
        state = {
            **self._trainer.state_dict(),
            "epochs_closed": self._epochs_closed,
            "epoch": self._epoch.state_dict(),
            "best_map": self._best_map,
            "failures": self._tally.state_dict(),
            "metric_lines": self._metrics.lines,
            "dataset": self._dataset.manifest.identity,
        }
        self._saved_path = self._folder.save(state)
        self._save_weights(LAST_NAME)
        self._folder.publish()
        self._saved_at = time.monotonic()

    def _save_weights(self, name: str) -> None:
        known = {"step": self._trainer.step, "epoch": self._epochs_closed, "mAP": self._best_map}
        model, metadata = self._trainer.trained_model, {**self._metadata, **known}
        self._folder.save_weights(name, model, metadata, self._export_dtype)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["dataset"] != self._dataset.manifest.identity:
            raise CheckpointError(
                f"{self._folder.path}: was trained on other clips or labels than {self._dataset.manifest.location} "
                "has now. Give the dataset it was started with, or start anew in another folder"
            )
        try:
            self._trainer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder.path}: its checkpoint does not fit the model: {error}") from error
        self._epochs_closed, self._best_map = state["epochs_closed"], state["best_map"]
        self._epoch = _EpochFigures(**state["epoch"])
        self._tally.load_state_dict(state["failures"])
        self._metric_lines = state["metric_lines"]

    def _result(self, *, finished: bool) -> RunResult:
        return RunResult(finished=finished, steps=self._trainer.step, best_map=self._best_map)
