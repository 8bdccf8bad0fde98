"""Models run over a dataset by several processes on Ray, each with a GPU where there are any: the same batches, sooner.

Imported only when somebody asks for `--ranks`, so that scoring needs no Ray.
"""

import os
import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pipeline.runtime.ray_session import running_ray  # first: it sets what Ray reads while it is imported

# isort: split
import numpy as np
import ray
import torch
from ray.exceptions import RayError

from pipeline import redaction
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import PipelineError, UsageError
from pipeline.labelling.actor_layout import fit_to_machines
from pipeline.models.device import Precision, choose_device
from pipeline.models.loading import LoadedModel
from pipeline.runtime.progress import progress_bar
from pipeline.runtime.ray_address import cluster_address
from pipeline.runtime.ray_capacity import RoomWatch, has_room_on_gpus, machines
from pipeline.runtime.ray_pulse import PulseBoard, PulseWatch, beating
from pipeline.runtime.same_code import check_versions, versions
from pipeline.scoring.scoring import System, run_models, scoring_batches
from pipeline.storage.mapped_arrays import scratch_array

_MAX_BATCHES = 64
"""That a process scores in one go: loaders are started for each, and one that dies costs no more."""
_TRIES = 2
_LOOK_SECONDS = 0.5

LoadModels = Callable[[Manifest, torch.device], list[LoadedModel]]


def run_models_on_ray(
    load: LoadModels,
    manifest: Manifest,
    *,
    ranks: int,
    address: str | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
    precision: Precision,
    patience: float,
) -> list[System]:
    """Run models over the whole dataset, whose batches any process takes that has nothing to do; see `run_models`.

    Args:
        load: loads the models; pickled, and called once in each process.
        manifest: the dataset, which all machines reach at its location.
        ranks: how many processes.
        address: of the Ray cluster; None is this machine.
        batch_size: clips a forward pass.
        workers: decoding processes of each.
        device: what they run on, as `choose_device` takes it.
        precision: of the networks.
        patience: how long there may be no sign of life of any of them, in seconds.

    Raises:
        UsageError: this machine has fewer GPUs or cores.
        LostProcessError: there was no sign of life for longer.
        PipelineError: the models can't be loaded, or Ray itself fails.
    """
    with running_ray(address):
        on_gpus = has_room_on_gpus(device)
        kind = "GPU" if on_gpus else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if ranks > there and cluster_address(address) is None:  # a cluster may grow
            raise UsageError(f"--ranks {ranks}: this machine has {there} {kind}s; a rank needs one of its own")
        layout = fit_to_machines(machines(), (ranks, ranks), None, 1.0 if on_gpus else 0.0)
        claims = {"num_cpus": layout.cpus_per_actor, "num_gpus": layout.gpus_per_actor}
        board: Any = ray.remote(num_cpus=0, max_restarts=-1)(PulseBoard).remote()
        scorer: Any = _Scorer.options(**claims)  # pyright: ignore[reportAttributeAccessIssue]
        options = {
            "batch_size": batch_size,
            "workers": layout.threads if workers is None else workers,
            "precision": precision,
        }
        scorers = [scorer.remote(load, manifest.location, device, options, board, versions()) for _ in range(ranks)]
        batches = scoring_batches(manifest, batch_size, torch.device("cuda" if on_gpus else "cpu"))
        room = RoomWatch("_Scorer", ranks, {"GPU": layout.gpus_per_actor, "CPU": layout.cpus_per_actor})
        with PulseWatch(board, patience) as watch:
            return _gather(scorers, batches, manifest, watch, room)


def _gather(
    scorers: Sequence[Any], batches: Sequence[np.ndarray], manifest: Manifest, watch: PulseWatch, room: RoomWatch
) -> list[System]:
    """Hand out the batches, and put together what comes back."""
    size = max(1, min(_MAX_BATCHES, -(-len(batches) // len(scorers))))
    left = deque(batches[first : first + size] for first in range(0, len(batches), size))
    # Who finds no room never becomes idle, and keeps nothing from the others.
    under_way: dict[Any, tuple[Any, Sequence[np.ndarray]]] = {one.score.remote([]): (one, []) for one in scorers}
    systems: list[System] = []
    done = 0
    try:
        with progress_bar("scoring", len(manifest)) as bar:
            while done < len(manifest):
                watch.check()
                room.look(enough=not left)
                for ready in ray.wait(list(under_way), num_returns=1, timeout=_LOOK_SECONDS)[0]:
                    one, scored = under_way.pop(ready)
                    found = cast("list[System] | PipelineError", ray.get(ready, timeout=_LOOK_SECONDS * 100))
                    if isinstance(found, PipelineError):
                        raise found
                    if scored:
                        rows = np.concatenate(scored)
                        systems = _merged(systems, found, rows, len(manifest))
                        done += len(rows)
                        bar.advance(len(rows))
                    if left:
                        next_ones = left.popleft()
                        under_way[one.score.remote(next_ones)] = one, next_ones
    except RayError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"Ray gave up: {reason}. Run the same command again") from error
    return systems


def _merged(systems: list[System], found: list[System], rows: np.ndarray, clips: int) -> list[System]:
    """Add what was found out about some rows to what is known."""
    if not systems:
        shape = (clips, found[0].logits.shape[1])
        systems = [replace(system, logits=scratch_array(shape, np.float32), failures={}) for system in found]
    for system, part in zip(systems, found, strict=True):
        system.logits[rows] = part.logits
        cast("dict[int, str]", system.failures).update(part.failures)
    return systems


@ray.remote(max_restarts=_TRIES - 1, max_task_retries=_TRIES - 1)
class _Scorer:
    """Loads the models at its first order, so that a failure comes back as one, not as a dead actor."""

    def __init__(
        self,
        load: LoadModels,
        data: str,
        device: str,
        options: dict[str, Any],
        board: Any,
        of_driver: Mapping[str, str],
    ) -> None:
        redaction.install()  # Ray keeps what an actor logs
        self._load, self._data, self._device, self._options, self._board = load, data, device, options, board
        self._versions = of_driver
        self._ready: tuple[Manifest, list[LoadedModel], torch.device] | None = None

    def score(self, batches: Sequence[np.ndarray]) -> list[System] | PipelineError:
        """Returns what each model says of some batches' rows, in their order, or what went wrong."""
        try:
            with beating(self._board, f"process {os.getpid()} on {platform.node()}"):
                return self._score(batches)
        except PipelineError as error:
            return error
        except Exception as error:
            return PipelineError(f"{type(error).__name__}: {error}")

    def _score(self, batches: Sequence[np.ndarray]) -> list[System]:
        if self._ready is None:
            check_versions(self._versions)
            manifest, device = read_manifest(self._data), choose_device(self._device)
            self._ready = manifest, self._load(manifest, device), device
        if not batches:
            return []
        manifest, models, device = self._ready
        systems = run_models(models, manifest, batches=batches, device=device, **self._options)
        rows = np.concatenate(batches)
        return [replace(system, logits=np.asarray(system.logits[rows])) for system in systems]
