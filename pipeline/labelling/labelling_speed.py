"""How fast stage 1 is: noted in the store by each run, or measured on a few of a dataset's clips."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from time import perf_counter

import torch
from torch import nn

import teacher
from pipeline.dataset.manifest import Manifest
from pipeline.errors import LogitStoreError
from pipeline.labelling.shard_decoder import ShardDecoder
from pipeline.labelling.teacher_spec import TeacherSpec
from pipeline.models.device import Precision
from pipeline.models.loading import is_registered
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.memory import keep_freed_memory
from pipeline.storage import files as storage

SPEED_NAME = "speed.json"
"""In a store: how fast the last run was that added something to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabellingSpeed:
    """What one run of stage 1 took."""

    clips: int
    busy_seconds: float
    """In which an actor was at work, summed over the actors."""
    seconds: float
    """From the command's start of Ray to the last part."""

    @property
    def clips_per_second(self) -> float:
        """Of one actor."""
        return self.clips / self.busy_seconds


def write_speed(store: str, speed: LabellingSpeed) -> None:
    """Note in a store how fast it was made."""
    storage.publish_bytes(storage.join_path(store, SPEED_NAME), json.dumps(asdict(speed)).encode() + b"\n")


def read_speed(store: str) -> LabellingSpeed | None:
    """Returns how fast a store was made; None where nobody noted it.

    Raises:
        LogitStoreError: the note is damaged.
    """
    location = storage.join_path(store, SPEED_NAME)
    if not storage.exists(location):
        return None
    try:
        speed = LabellingSpeed(**json.loads(storage.read_bytes(location)))
        if not (speed.clips > 0 and speed.busy_seconds > 0):
            raise ValueError("no time was noted")
        return speed
    except (ValueError, TypeError) as error:
        raise LogitStoreError(f"{location}: not a note of a speed ({error}). Measure with another run") from error


def measure_labelling(
    specs: Sequence[TeacherSpec],
    manifest: Manifest,
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    seconds: float,
) -> LabellingSpeed:
    """Let teachers listen to a dataset's clips for some seconds, as stage 1 would, and publish nothing.

    A registered teacher gets random weights, which are as fast as any.

    Args:
        specs: the teachers.
        manifest: the dataset; its shards are gone through again where they are few.
        device: where the teachers run.
        precision: of their matrix products.
        batch_size: clips a forward pass.
        seconds: how long, from the end of the first batch on; one batch more is always heard.

    Raises:
        PipelineError: a shard can't be read, or a teacher from elsewhere can't be loaded.
    """
    if device.type == "cpu":
        keep_freed_memory()
    ensemble = teacher.Ensemble(
        (_build(spec, manifest, device) for spec in specs), [spec.weight for spec in specs], getattr(torch, precision)
    )
    decoder = ShardDecoder(
        manifest,
        sample_rates_hz=ensemble.sample_rates_hz,
        seconds=ensemble.clip_seconds,
        batch_size=batch_size,
        processes=usable_cores(),
        pin_memory=device.type == "cuda",
    )
    clips, started = 0, 0.0
    try:
        for shard, following in pairwise(cycle(manifest.shards)):
            for batch in decoder.batches(shard, following):
                for view in batch.views:
                    waveforms = {rate: tensor.to(device) for rate, tensor in view.waveforms.items()}
                    ensemble.mean(ensemble(waveforms, None, view.lengths)).cpu()
                now = perf_counter()
                if not started:  # the first batch also warmed up
                    started = now
                    continue
                clips += len(batch.rows) + len(batch.failures)
                if now - started >= seconds:
                    return LabellingSpeed(clips=clips, busy_seconds=now - started, seconds=now - started)
    finally:
        decoder.close()
    raise AssertionError("shards are gone through without end")


def _build(spec: TeacherSpec, manifest: Manifest, device: torch.device) -> nn.Module:
    if not is_registered(teacher, spec.name):
        return spec.load(manifest, str(device)).network
    return teacher.create_model(spec.name, num_classes=len(manifest.vocabulary)).to(device)
