"""A training run from its start, or from where it stopped, to its end: logs, evaluates and saves as it goes."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from pipeline.batches.join import FailureTally, JoinedDataset, TrainingBatch, loader_processes
from pipeline.batches.reading import kept_seconds
from pipeline.batches.sampling import EpochSampler, StreamSampler, build_sampler
from pipeline.batches.streaming import load_steps
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.clip_lengths import ORDINARY_SECONDS
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewsStamp
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.decoding.pool import DecodingPool
from pipeline.errors import (
    CheckpointError,
    LostProcessError,
    StorageFullError,
    StorageUnavailableError,
    TooManyFailuresError,
    TrainingDivergedError,
    UsageError,
)
from pipeline.logits.alignment import AlignedLogits
from pipeline.models.device import Precision, repeat_exactly, training_precision
from pipeline.models.hearing import AudioModel, model_input
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.progress import MetricLog, ProgressBar, progress_bar
from pipeline.runtime.stopping import StopRequest, StopRequestedError, stop_on_signals, stopping_signal
from pipeline.storage.cache import ShardMirror
from pipeline.storage.one_writer import one_writer
from pipeline.training.evaluation import Evaluation
from pipeline.training.folder import BEST_NAME, LAST_NAME, RunFolder, precision_of_run
from pipeline.training.loop import Learner, StepReport, Trainer, TrainingConfig
from pipeline.training.ranks import Ranks, launch_id, process_group

_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    finished: bool
    """False where somebody stopped it; `--resume` goes on."""
    steps: int
    best_score: float | None
    """The best value of the metric that decides (mAP, or what the command says), on the evaluation clips; None where
    nothing was evaluated."""


def open_clips(
    config: TrainingConfig,
    manifest: Manifest,
    model: AudioModel,
    logits: AlignedLogits | None = None,
    views: ViewsStamp | None = None,
) -> JoinedDataset:
    """Join a dataset's clips with logits, in the form that `model` takes, and in the views that those are of.

    Raises:
        UsageError: decoded audio is to be kept, but the disk has no room for a single clip.
    """
    wanted, cache, folder = model_input(model), None, config.cache_folder()
    rate, own_lengths = wanted.sample_rate_hz, wanted.own_lengths
    if config.cache_audio:
        samples = round(rate * kept_seconds(min(wanted.seconds, ORDINARY_SECONDS), views))
        cache = WaveformCache(folder, manifest, sample_rate_hz=rate, samples=samples, own_lengths=own_lengths)
    return JoinedDataset(
        manifest,
        sample_rate_hz=rate,
        seconds=wanted.seconds,
        own_lengths=own_lengths,
        logits=logits,
        cache=cache,
        mirror=ShardMirror(folder, manifest.location),
        views=views,
    )


def start_pool(config: TrainingConfig, device: torch.device, stop: StopRequest) -> DecodingPool:
    """Start the processes that read and decode for this rank; waiting for them ends when `stop` asks for an end.

    Args:
        config: the settings.
        device: what is fed.
        stop: asks for an end.

    Raises:
        LostProcessError: one can't be started.
    """
    return DecodingPool(
        loader_processes(config.workers, device),
        patience=config.patience,
        interrupted=lambda: stop.requested,
        remedy="Give the machine or container more memory, or take fewer --workers or a smaller --batch-size",
    )


def run_training(
    config: TrainingConfig,
    learner: Learner,
    *,
    dataset: JoinedDataset,
    eval_dataset: JoinedDataset | None,
    schedule: Callable[[int], float],
    export_dtype: torch.dtype = torch.float32,
) -> RunResult:
    """Start or resume the run that the settings describe, and train until it is done or stopped.

    Where several processes were started together (`torchrun`, Ray Train), all of them call this with the same
    arguments, and train one model; the first one alone touches the run's folder.

    Args:
        config: the settings.
        learner: the model and its loss.
        dataset: the clips to learn from.
        eval_dataset: the clips to evaluate on, if any.
        schedule: epoch → what the learning rate is multiplied by.
        export_dtype: of the numbers in the files of weights.

    Raises:
        PipelineError: the settings don't fit the folder or the dataset, or the run can't go on.
    """
    manifest = dataset.manifest
    if eval_dataset is not None:
        _check_eval(config, manifest, eval_dataset.manifest)
    with process_group(config.patience, config.device) as ranks, ExitStack() as stack:
        device = ranks.device(config.device)
        config = ranks.broadcast(partial(with_precision, config, device))
        if config.deterministic:
            repeat_exactly()
        sampler = build_sampler(
            manifest,
            has_logits=dataset.has_logits,
            sampling=config.sampling,
            batch_size=config.batch_size,
            clips_per_epoch=config.clips_per_epoch,
            seed=config.seed,
            read_window=config.read_window,
            stream=config.stream,
            ranks=ranks.world_size,
        )
        folder: RunFolder | None = None

        def open_folder() -> dict[str, Any] | None:
            nonlocal folder
            stack.enter_context(one_writer(config.run))
            folder = RunFolder(config, launch_id())
            return folder.newest_state()

        state = ranks.broadcast(open_folder)
        if device.type == "cpu":
            keep_freed_memory()
        trainer = Trainer(learner, config, sampler, schedule, device, ranks)
        _log_sampler(config, sampler, manifest, device, ranks)
        run = TrainingRun(
            config,
            folder,
            state,
            trainer=trainer,
            sampler=sampler,
            learner=learner,
            dataset=dataset,
            eval_dataset=eval_dataset,
            device=device,
            ranks=ranks,
            metadata=_vocabulary_metadata(manifest.vocabulary),
            export_dtype=export_dtype,
        )
        if folder is not None:
            stack.callback(folder.close)
        return run.go()


def with_precision(config: Config, device: torch.device) -> Config:
    """Returns the settings with what `auto` stands for on a device, or in the run that is to be resumed."""
    if config.precision != "auto":
        return config
    begun = precision_of_run(config.run) if config.resume else None
    return replace(config, precision=begun or training_precision(config.precision, device))


def _check_eval(config: TrainingConfig, manifest: Manifest, eval_manifest: Manifest) -> None:
    if eval_manifest.vocabulary.sha256 != manifest.vocabulary.sha256:
        raise UsageError(f"--eval-data {config.eval_data}: has other classes than --data {config.data}")
    if not len(eval_manifest):
        raise UsageError(f"--eval-data {config.eval_data}: holds no clips, so there is nothing to evaluate on")


def _vocabulary_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "classes": len(vocabulary),
        "vocabulary_sha256": vocabulary.sha256,
        "vocabulary": vocabulary.to_csv_bytes().decode(),
    }


def _log_sampler(
    config: TrainingConfig, sampler: EpochSampler, manifest: Manifest, device: torch.device, ranks: Ranks
) -> None:
    where = f"{ranks.world_size} ranks, this one on {device}" if ranks.world_size > 1 else str(device)
    _log.info(
        "%d epochs of %d steps of %d clips on %s", config.epochs, sampler.steps_per_epoch, config.batch_size, where
    )
    clips, never, unknown = len(manifest), sampler.weights == 0, manifest.unlabelled
    if empty := np.count_nonzero(never & ~unknown):
        _log.warning("%d of %d clips have no labels: balanced sampling never draws them", empty, clips)
    if useless := np.count_nonzero(never & unknown):
        _log.warning("%d of %d clips have neither known labels nor logits: they are never drawn", useless, clips)
    if taught := np.count_nonzero(unknown & ~never):
        _log.info("%d of %d clips have no known labels: they learn from the logits alone", taught, clips)
    if isinstance(sampler, StreamSampler):
        _log.info(
            "an epoch streams 1/%d of the shards; %.1f %% of what it reads is thrown away",
            sampler.epochs_per_pass,
            100 * sampler.discarded,
        )


@dataclass(kw_only=True, slots=True)
class _EpochMetrics:
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


def _in_words(values: Mapping[str, float], best: str) -> str:
    text = f"loss {values['epoch/loss']:.4f}, {values['epoch/clips_per_second']:.1f} clips/s"
    text += f", {100 * values['epoch/data_wait_share']:.0f} % of the time waiting for data"
    return text + (
        f", {best} {values[name]:.4f} on {values['eval/clips']:.0f} clips" if (name := f"eval/{best}") in values else ""
    )


class TrainingRun:
    """One run: a trainer, the folder that it is kept in, and what was measured so far.

    Args:
        config: the settings.
        folder: the run's, on the first rank; None on the others, which write nothing.
        state: to go on from; None starts anew.
        trainer: the model in training.
        sampler: which clips each step takes.
        learner: scores predictions.
        dataset: the clips to learn from.
        eval_dataset: the clips to evaluate on, if any.
        device: where the model is.
        ranks: the processes that train it together.
        metadata: goes into the headers of the weights' files.
        export_dtype: of the numbers in those files.

    Raises:
        CheckpointError: the state belongs to another model or dataset.
    """

    _metrics: MetricLog | None = None
    _bar: ProgressBar | None = None

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder | None,
        state: Mapping[str, Any] | None,
        *,
        trainer: Trainer,
        sampler: EpochSampler,
        learner: Learner,
        dataset: JoinedDataset,
        eval_dataset: JoinedDataset | None,
        device: torch.device,
        ranks: Ranks,
        metadata: Mapping[str, Any],
        export_dtype: torch.dtype,
    ) -> None:
        self._config, self._folder = config, folder
        self._trainer, self._sampler, self._learner = trainer, sampler, learner
        self._dataset, self._device, self._ranks, self._metadata = dataset, device, ranks, metadata
        self._export_dtype = export_dtype
        self._tally = FailureTally(dataset.manifest, max_share=config.max_failed)
        self._epochs_closed = 0
        self._epoch = _EpochMetrics()
        self._best_score: float | None = None
        self._metric_lines = 0
        self._failures_reported = 0
        self._saved_at = time.monotonic()
        self._saved_path: Path | None = None
        self._unread: StepReport | None = None
        self._evaluation: Evaluation | None = None
        self._eval_batches: Iterator[TrainingBatch] | None = None
        """Of the evaluation that comes next, as soon as its clips are being decoded."""
        if eval_dataset is not None:
            self._evaluation = Evaluation(
                dataset=eval_dataset,
                score=learner.score,
                batch_size=config.batch_size,
                device=device,
                precision=cast("Precision", config.precision),
                max_failed=config.max_failed,
                ranks=ranks,
            )
        if state is not None:
            self._restore(state)

    def go(self) -> RunResult:
        """Train to the end, or until Ctrl-C or SIGTERM; either way all is saved.

        Raises:
            TrainingDivergedError: a loss or a gradient is not finite.
            TooManyFailuresError: too many clips can't be read; what was learned is saved.
            StorageFullError: a log or a checkpoint finds no room; what was learned is saved if there is room for that.
        """
        total = self._config.epochs * self._sampler.steps_per_epoch
        if self._trainer.step >= total and self._epochs_closed >= self._config.epochs:
            where, done = self._config.run, self._epochs_closed
            _log.info("%s is finished: %d epochs are done. Raise --epochs to go on", where, done)
            return self._result(finished=True)
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            pool = stack.enter_context(start_pool(self._config, self._device, stop))
            batches = self._load(pool, total)
            # Takes seconds, in which the first batches are decoded.
            if self._folder is not None:
                self._open_logs(stack, self._folder, total)
            if self._device.type == "cuda":
                self._trainer.warm_up()
            try:
                self._train(self._accounted(batches, total, stop), stop, pool)
            except StopRequestedError:
                self._save()
                why, step = stopping_signal(signal.SIGTERM).name, self._trainer.step
                _log.warning("stopped by %s after step %d of %d; all is saved, and --resume goes on", why, step, total)
                return self._result(finished=False)
            except LostProcessError as error:
                self._save()
                saved = "what the first rank saved" if self._folder is None else f"all up to step {self._trainer.step}"
                raise LostProcessError(f"{error}; {saved} is kept, and --resume goes on from there") from error
            except (TooManyFailuresError, StorageUnavailableError, StorageFullError):
                self._save()
                raise
            self._save()
        return self._result(finished=True)

    def _open_logs(self, stack: ExitStack, folder: RunFolder, total: int) -> None:
        step, batch = self._trainer.step, self._config.batch_size
        folder.begin()
        log = MetricLog(folder.path, kept_lines=self._metric_lines, after_step=step)
        self._metrics = stack.enter_context(log)
        self._bar = stack.enter_context(progress_bar("training", total * batch, done=step * batch))

    def _load(self, pool: DecodingPool, total: int) -> Iterator[TrainingBatch]:
        """Returns this rank's batches of the steps that are left; the first ones are decoded from now on."""
        return load_steps(
            self._dataset,
            self._sampler,
            first_step=self._trainer.step,
            end_step=total,
            positions=self._trainer.positions,
            workers=pool,
            device=self._device,
        )

    def _train(self, batches: Iterator[TrainingBatch], stop: StopRequest, pool: DecodingPool) -> None:
        if self._trainer.step == (self._epochs_closed + 1) * self._sampler.steps_per_epoch:
            self._end_epoch(stop, pool)  # it was stopped while its last epoch was evaluated
        try:
            for report in self._trainer.steps(batches):
                self._record(report)
                self._prepare_evaluation(pool)
                if report.ends_epoch:
                    self._end_epoch(stop, pool)
                if time.monotonic() - self._saved_at >= 60 * self._config.checkpoint_minutes:
                    self._save()
        except FloatingPointError as error:
            raise self._diverged(error) from error
        self._read_last()

    def _accounted(self, loaded: Iterator[TrainingBatch], total: int, stop: StopRequest) -> Iterator[TrainingBatch]:
        """Pass this rank's batches on; count all ranks' failed clips, and the time spent waiting for data.

        Raises:
            LostProcessError: a decoding process of one of the ranks died or does not answer.
            StopRequestedError: somebody asked one of the ranks to end; all of them stop before the same step.
        """
        for rows in self._sampler.batches(self._trainer.step, total):  # of all ranks
            asked = time.monotonic()
            batch, failures = None, ()
            problem: Exception | None = None
            try:
                batch = next(loaded)
                failures = batch.failures
            except (StopRequestedError, LostProcessError) as error:
                problem = error
            if stop.requested and problem is None:
                problem = StopRequestedError()
            self._epoch.waited += time.monotonic() - asked
            (failed,) = self._ranks.go_on_together(problem, [len(failures)])
            assert batch is not None
            found = [one for some in self._ranks.all_gather(failures) for one in some] if failed else []
            self._tally.count(rows, found)
            yield batch

    def _record(self, report: StepReport) -> None:
        """Note a step. Its loss is read a step later, or before an epoch or the run ends: a GPU may not have it yet."""
        self._read_last()
        self._unread = report

    def _read_last(self) -> None:
        report, self._unread = self._unread, None
        if report is None:
            return
        self._epoch.add(report)
        if self._bar is not None:
            note = f"epoch {report.epoch + 1}/{self._config.epochs} loss {report.loss:.4f}"
            self._bar.advance(self._config.batch_size, note=note)
        if report.step % self._config.log_every == 0:
            values = {"train/loss": report.loss, "train/learning_rate": report.learning_rate}
            if not report.skipped:
                values["train/gradient_norm"] = report.gradient_norm
            if self._config.precision == "float16":
                values["train/skipped_steps"] = float(self._trainer.skipped_steps)
            self._write(report.step, values, epoch=report.epoch)

    def _write(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        if self._metrics is not None:
            self._metrics.write(step, values, epoch=epoch)

    def _prepare_evaluation(self, pool: DecodingPool) -> None:
        """Let the first clips to evaluate on be decoded as soon as the epoch's last ones are."""
        if self._evaluation is None or self._eval_batches is not None or not self._evaluates:
            return
        steps_left = (self._epochs_closed + 1) * self._sampler.steps_per_epoch - self._trainer.step
        if steps_left <= pool.ahead:  # those that are left have all been asked for
            self._eval_batches = self._evaluation.load(pool)

    @property
    def _evaluates(self) -> bool:
        """Whether the end of this epoch is evaluated, where there is something to evaluate on."""
        epoch = self._epochs_closed + 1
        return epoch == self._config.epochs or epoch % self._config.evaluate_every == 0

    def _end_epoch(self, stop: StopRequest, pool: DecodingPool) -> None:
        """Evaluate, write the epoch's metrics and start the next one. Only then does a checkpoint count it as done."""
        self._read_last()
        self._trainer.settle()
        epoch, epochs = self._epochs_closed, self._config.epochs
        values = self._epoch.values() | {"epoch/ranks": float(self._ranks.world_size)}
        if self._evaluation is not None and self._evaluates:
            if self._bar is not None:
                self._bar.advance(0, note=f"evaluating on {len(self._evaluation.dataset.manifest)} clips")
            self._trainer.broadcast_buffers()
            batches, self._eval_batches = self._eval_batches or self._evaluation.load(pool), None
            metrics = self._evaluation.run(self._trainer.trained_model, stop, batches)
            values |= {f"eval/{name}": value for name, value in metrics.items()}
        self._write(self._trainer.step, values, epoch=epoch)
        _log.info("epoch %d/%d: %s", epoch + 1, epochs, _in_words(values, self._learner.best_metric))
        self._epochs_closed += 1
        self._epoch = _EpochMetrics()
        score = values.get(f"eval/{self._learner.best_metric}", math.nan)
        if score > (-math.inf if self._best_score is None else self._best_score):
            self._best_score = score
            self._save_weights(BEST_NAME)
        self._report_failures()

    def _report_failures(self) -> None:
        failures = self._tally.failures
        if len(failures) > self._failures_reported:
            self._failures_reported = len(failures)
            if self._folder is not None:
                path = self._folder.list_failures(failures)
                _log.warning("%s; listed in %s", self._tally.summary(), path)
        self._tally.check()

    def _diverged(self, error: FloatingPointError) -> TrainingDivergedError:
        rows = self._sampler.batch_at(self._trainer.step)
        clip_ids = ", ".join(self._tally.clip_id(int(row)) for row in rows)
        good = self._saved_path or "there is none yet"
        return TrainingDivergedError(
            f"step {self._trainer.step + 1}: {error}. The clips of the batch: {clip_ids}. The last good checkpoint: "
            f"{good}. Try a lower --learning-rate, --optimizer.max-gradient-norm 1 or --precision float32"
        )

    def _save(self) -> None:
        self._read_last()
        if self._folder is None:
            return
        assert self._metrics is not None
        try:
            trained = self._trainer.state_dict()
        except FloatingPointError as error:
            raise self._diverged(error) from error
        state = {
            **trained,
            "epochs_closed": self._epochs_closed,
            "epoch": self._epoch.state_dict(),
            "best_score": self._best_score,
            "failures": self._tally.state_dict(),
            "metric_lines": self._metrics.lines,
            "dataset": self._dataset.manifest.identity,
            "ranks": self._ranks.world_size,
        }
        self._saved_path = self._folder.save(state)
        self._save_weights(LAST_NAME)
        self._folder.publish()
        self._saved_at = time.monotonic()

    def _save_weights(self, name: str) -> None:
        if self._folder is None:
            return
        known = {"step": self._trainer.step, "epoch": self._epochs_closed, self._learner.best_metric: self._best_score}
        model, metadata = self._trainer.trained_model, {**self._learner.model_metadata(), **self._metadata, **known}
        self._folder.save_weights(name, model, metadata, self._export_dtype)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["dataset"] != self._dataset.manifest.identity:
            raise CheckpointError(
                f"{self._config.run}: was trained on other clips or labels than {self._dataset.manifest.location} "
                "has now. Give the dataset it was started with, or start anew in another folder"
            )
        try:
            self._trainer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._config.run}: its checkpoint does not fit the model: {error}") from error
        if state["ranks"] != self._ranks.world_size:
            ranks = state["ranks"], self._ranks.world_size
            _log.warning("the run was on %d ranks, this is on %d: the clips are the same, the rounding is not", *ranks)
        self._epochs_closed, self._best_score = state["epochs_closed"], state["best_score"]
        self._epoch = _EpochMetrics(**state["epoch"])
        self._tally.load_state_dict(state["failures"])
        self._metric_lines = state["metric_lines"]

    def _result(self, *, finished: bool) -> RunResult:
        return RunResult(finished=finished, steps=self._trainer.step, best_score=self._best_score)
