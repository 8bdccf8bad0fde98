"""A network of a few hundred weights that has all that makes a resume hard: batch statistics, dropout, own chance."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batches.join import TrainingBatch
from pipeline.training.loop import Learner


class BandEnergies(nn.Module):
    """Waveforms → the energy of 16 bands."""

    def forward(self, waveforms: Tensor) -> Tensor:
        power = torch.fft.rfft(waveforms).abs().square()[:, 1:2001].reshape(len(waveforms), 16, -1)
        return (power.mean(dim=2) + 1e-3).log()  # (batch, bands)


class TinyModel(nn.Module):
    sample_rate_hz = 8000
    input_seconds = 0.5

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front_end = BandEnergies()
        self.network = nn.Sequential(
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features)


class TinyLearner(Learner):
    """Learns labels; `nan_at` makes the loss of that call of `loss`, counted from 1, not a number."""

    model: TinyModel

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__(TinyModel())
        self.calls = 0
        self._nan_at = nan_at

    def loss(self, network: nn.Module, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        self.calls += 1
        shaken = 0.1 * torch.randn(batch.global_batch_size, 16, generator=generator)[batch.positions]
        features = self.model.front_end(batch.waveforms) + shaken
        loss = nn.functional.binary_cross_entropy_with_logits(network(features), batch.labels)
        return loss * float("nan") if self.calls == self._nan_at else loss

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        return {"mAP": float((logits.argmax(axis=1) == labels.argmax(axis=1)).mean())}

    def model_metadata(self) -> dict[str, Any]:
        return {"model": "tiny", "stage": "student", "kwargs": {}}
