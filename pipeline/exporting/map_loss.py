"""What a file with fewer bits costs in mAP, on the clips of a dataset."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.dataset.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.exporting.comparing import Runner
from pipeline.exporting.exported_model import ExportedModel
from pipeline.exporting.onnx_model import logits_of
from pipeline.models.loading import LoadedModel
from pipeline.scoring.intervals import BootstrapConfig, Interval
from pipeline.scoring.scoring import run_models, score


@dataclass(frozen=True, slots=True)
class MapLoss:
    """The mAP of a checkpoint and of a file on the same clips."""

    before: float
    after: float
    clips: int
    interval: Interval | None
    """The 95 % interval, over clips, of what was lost; None where nothing can be drawn."""

    @property
    def loss(self) -> float:
        """How much lower the file's is."""
        return self.before - self.after

    def __str__(self) -> str:
        told = f"mAP {self.after:.4f}, the checkpoint {self.before:.4f}"
        if self.interval is None:
            return told
        return f"{told} (95 % interval of the loss {self.interval.low:+.4f} to {self.interval.high:+.4f})"

    def check(self, allowed: float) -> None:
        """Refuse a file that lost more.

        Raises:
            PipelineError: it did.
        """
        if not self.loss <= allowed:
            raise PipelineError(
                f"8-bit integers cost {self.loss:.4f} of mAP ({self.before:.4f} before, {self.after:.4f} after, on "
                f"{self.clips} clips); {allowed:g} are allowed (--max-map-loss). Nothing was written. Calibrate with "
                "more sounds, of the kind that is tagged"
            )


def measure_map_loss(run: Runner, exported: ExportedModel, model: LoadedModel, manifest: Manifest) -> MapLoss:
    """Score a file beside the checkpoint that it was made from.

    Args:
        run: runs the file.
        exported: what the file computes.
        model: the checkpoint.
        manifest: the dataset to score on.

    Raises:
        TooManyFailuresError: more than a hundredth of the clips can't be decoded.
    """
    file = replace(model, network=_FileNetwork(run, exported), name="file")
    systems = run_models(
        [model, file], manifest, batch_size=None, workers=None, device=torch.device("cpu"), precision="float32"
    )
    report = score(systems, manifest, max_failed=0.01, resampling=BootstrapConfig())
    before, after = report.systems
    return MapLoss(
        before=before.mean_average_precision,
        after=after.mean_average_precision,
        clips=report.clips,
        interval=Interval.of(before.replicates - after.replicates),
    )


class _FileNetwork(nn.Module):
    """An exported file, called as a network is."""

    def __init__(self, run: Runner, exported: ExportedModel) -> None:
        super().__init__()
        self.front_end = nn.Identity() if exported.takes == "inside" else exported.network.front_end
        self.sample_rate_hz, self.input_seconds = exported.sample_rate_hz, exported.network.input_seconds
        self._run, self._is_logits, self._task = run, exported.output == "logits", exported.task

    def forward(self, sound: Tensor) -> Tensor:
        """Returns logits, (batch, classes)."""
        found = self._run(sound.numpy())
        return torch.from_numpy(np.asarray(found if self._is_logits else logits_of(found, self._task), np.float32))
