"""Models + batches of waveforms → logits, for scoring: nothing learns here."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.device import Precision
from pipeline.models.hearing import tag_waveforms
from pipeline.models.transfer import DeviceCopies


class WaveformBatch(Protocol):
    """What a loader hands over; a training batch fits too."""

    @property
    def rows(self) -> Tensor:
        """(batch,), int64: the clips' rows in the manifest."""
        ...

    @property
    def waveforms(self) -> Tensor:
        """(batch, samples), float32, -1 to 1; zeros behind clips that are shorter than the longest."""
        ...

    @property
    def lengths(self) -> Tensor | None:
        """(batch,), int64, on the CPU: the samples of each clip; None where all are equal."""
        ...

    @property
    def valid(self) -> Tensor:
        """(batch,), bool: False where the clip could not be decoded."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """The logits of some models for the clips that could be decoded."""

    rows: np.ndarray
    """(clips,), int64: rows in the manifest, in the order of the batches."""
    logits: np.ndarray
    """(models, clips, classes), float32."""


def predict(
    models: Sequence[nn.Module],
    batches: Iterable[WaveformBatch],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Predictions:
    """Run models over the same batches, without gradients, dropout or augmentation.

    Every clip is decoded once, however many models there are, so the models share one sample rate and one length.
    Clips that are not valid are left out; counting them is the loader's part.

    Args:
        models: each takes `.front_end(waveforms)`; they must be on `device` already, and come back in the mode
            (training or evaluation) they were in.
        batches: waveforms at the models' rate.
        device: where the models are.
        precision: other than float32 means autocast around the networks.
    """
    found = list(iter_predictions(models, batches, device=device, precision=precision))
    if not found:
        return Predictions(rows=np.empty(0, np.int64), logits=np.empty((len(models), 0, 0), np.float32))
    return Predictions(
        rows=np.concatenate([some.rows for some in found]),
        logits=np.concatenate([some.logits for some in found], axis=1),
    )


def iter_predictions(
    models: Sequence[nn.Module],
    batches: Iterable[WaveformBatch],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Iterator[Predictions]:
    """Yields what `predict` returns, batch by batch, with nothing gathered; a batch without a valid clip is skipped."""
    copies, before = DeviceCopies(device), None
    with _evaluation_mode(models), torch.inference_mode():
        for batch in batches:
            valid = batch.valid
            if not valid.any():
                continue
            chosen = batch.waveforms if valid.all() else batch.waveforms[valid]
            [waveforms] = copies.copy([chosen])  # (batch, samples)
            lengths = None if batch.lengths is None else batch.lengths[valid]
            logits = torch.stack([tag_waveforms(model, waveforms, lengths, precision) for model in models])
            # A GPU goes on with the next batch while the logits of the last one are fetched.
            if before is not None:
                yield before.fetched()
            before = _Computed(batch.rows[valid].numpy(), logits)
        if before is not None:
            yield before.fetched()


@dataclass(frozen=True, slots=True)
class _Computed:
    rows: np.ndarray
    logits: Tensor
    """(models, clips, classes), on the device."""

    def fetched(self) -> Predictions:
        return Predictions(rows=self.rows, logits=self.logits.cpu().numpy())


@contextmanager
def _evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    # Module by module: a model being trained may keep some of its layers in evaluation mode.
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
