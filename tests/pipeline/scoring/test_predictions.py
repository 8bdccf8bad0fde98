from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.scoring.predictions import predict


@dataclass
class Batch:
    rows: Tensor
    waveforms: Tensor
    valid: Tensor
    lengths: Tensor | None = None


class Loudness(nn.Module):
    """A model of two classes whose dropout would show if it were left on."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.front_end = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(4).eval()
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[weight], [-weight]])

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.dropout(features).mean(dim=1, keepdim=True))  # (batch, classes)


def batches() -> list[Batch]:
    waveforms = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    valid = torch.tensor([True, False, True, False, True])
    rows = torch.tensor([7, 3, 9, 1, 4])
    return [Batch(rows[part], waveforms[part], valid[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 5))]


def test_each_model_scores_every_valid_clip_in_the_batches_order() -> None:
    predictions = predict([Loudness(1.0), Loudness(10.0)], batches())
    assert predictions.rows.tolist() == [7, 9, 4]
    means = np.array([1.5, 9.5, 17.5], np.float32)
    np.testing.assert_allclose(predictions.logits[0], np.stack([means, -means], axis=1))
    np.testing.assert_allclose(predictions.logits[1], np.stack([means, -means], axis=1) * 10)
    assert predictions.logits.dtype == np.float32


def test_models_come_back_in_the_mode_they_were_in_layer_by_layer() -> None:
    model = Loudness(1.0).train()
    model.frozen.eval()
    predict([model], batches())
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_reduced_precision_still_gives_float32_logits() -> None:
    predictions = predict([Loudness(1.0)], batches(), precision="bfloat16")
    assert predictions.logits.dtype == np.float32
    assert predictions.logits[0, :, 0] == pytest.approx([1.5, 9.5, 17.5], rel=1e-2)


def test_no_decodable_clip_gives_no_rows() -> None:
    nothing = [Batch(torch.tensor([0]), torch.zeros(1, 4), torch.tensor([False]))]
    assert len(predict([Loudness(1.0)], nothing).rows) == 0
