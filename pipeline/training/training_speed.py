"""How fast stage 2 is: read from a run's metrics, or measured by a few steps."""

from statistics import median
from time import perf_counter

import torch

from pipeline.batches.sampling import build_sampler
from pipeline.batches.streaming import load_steps
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UsageError
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.progress import read_metrics
from pipeline.runtime.stopping import StopRequest
from pipeline.training.loop import Learner, Trainer, TrainingConfig
from pipeline.training.run import open_clips, start_pool


def speed_of_run(run: str) -> float:
    """Returns the clips a second of one rank of a run, the median of its epochs, evaluation not counted.

    Raises:
        UsageError: the run has no finished epoch.
    """
    epochs = [line for line in read_metrics(run) if "epoch/clips_per_second" in line]
    if not epochs:
        raise UsageError(f"--measured {run}: no epoch of it is finished, so its speed is not known")
    return median(line["epoch/clips_per_second"] / line.get("epoch/ranks", 1) for line in epochs)


def measure_training(
    config: TrainingConfig, learner: Learner, manifest: Manifest, *, device: torch.device, seconds: float
) -> float:
    """Train for some seconds on a dataset's clips, as a run on one rank would, and keep nothing.

    Args:
        config: batch size, sampling, loader processes.
        learner: the model and its loss.
        manifest: the clips to learn from.
        device: where the model goes.
        seconds: how long, from the end of the first step on; one step more is always made.

    Returns:
        Clips a second.

    Raises:
        PipelineError: the clips can't be read.
    """
    if device.type == "cpu":
        keep_freed_memory()
    sampler = build_sampler(
        manifest,
        sampling=config.sampling,
        batch_size=config.batch_size,
        clips_per_epoch=config.clips_per_epoch,
        seed=config.seed,
    )
    trainer = Trainer(learner, config, sampler, lambda epoch: 1.0, device)
    dataset = open_clips(config, manifest, learner.model)  # pyright: ignore[reportArgumentType]
    started = 0.0
    with start_pool(config, device, StopRequest()) as pool:
        for report in trainer.steps(load_steps(dataset, sampler, workers=pool, device=device)):
            now = perf_counter()
            started = started or now  # the first step also warmed up
            if report.step > 1 and now - started >= seconds:
                return (report.step - 1) * config.batch_size / (now - started)
    raise AssertionError("steps are loaded without end")
