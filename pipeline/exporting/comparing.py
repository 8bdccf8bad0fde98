"""An exported file against the model that it was made from, on sounds, before anybody gets it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import PipelineError
from pipeline.exporting.exported_model import ExportedModel
from pipeline.exporting.onnx_model import open_session

SECONDS = (0.5, 1.0, 3.3, 10.0, 30.0)
BATCHES = (1, 3)
TOLERANCE = 1e-4
"""Of the spread of a clip's outputs, largest less smallest."""
_SMALLEST_SPREAD = 1e-3
"""Outputs that hardly differ, such as those of an untrained model, are held to a ten-millionth."""

Runner = Callable[[np.ndarray], np.ndarray]
"""The file's input → its output."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between a file and its model."""

    absolute: float
    relative: float
    """In terms of the spread of that clip's outputs."""


def compare(
    run: Runner, exported: ExportedModel, sounds: Sequence[np.ndarray], tolerance: float = TOLERANCE
) -> Difference:
    """Run a file and its model on the same sounds, of several lengths where both take any, one and three at once.

    Args:
        run: runs the file.
        exported: what it was made from.
        sounds: each (samples,), float32, at the model's rate; a short one is repeated.
        tolerance: the largest relative difference that is allowed.

    Raises:
        PipelineError: they differ by more than the tolerance, or the file does not run.
    """
    worst = Difference(0.0, 0.0)
    for waveforms in _batches(sounds, exported):
        with torch.inference_mode():
            features = exported.features(torch.from_numpy(waveforms))
            wanted = exported.finish(features).numpy()
        given = waveforms if exported.takes == "inside" else features.numpy()
        try:
            found = run(given)
        except Exception as error:
            seconds = waveforms.shape[1] / exported.sample_rate_hz
            raise PipelineError(
                f"the exported model can't be run on {len(waveforms)} sounds of {seconds:g} s: "
                f"{' '.join(str(error).split())[:300]}. Nothing was written"
            ) from error
        difference = _difference(found, wanted)
        if not difference.relative <= worst.relative:  # also where it is no number
            worst = difference
    if not worst.relative <= tolerance:
        raise PipelineError(
            f"the exported model differs from the checkpoint by {worst.absolute:.1e}, {worst.relative:.1e} of the "
            f"outputs' spread; {tolerance:.0e} are allowed. Nothing was written"
        )
    return worst


def onnx_runner(path: Path) -> Runner:
    """Returns what runs an ONNX file's only output."""
    session = open_session(path, "the exported model")
    name = session.get_inputs()[0].name

    def run(given: np.ndarray) -> np.ndarray:
        (found,) = session.run(None, {name: given})
        return np.asarray(found)

    return run


def _batches(sounds: Sequence[np.ndarray], exported: ExportedModel) -> Iterator[np.ndarray]:
    """Yields (batch, samples) of each length and batch size; sounds take turns."""
    lengths = [round(seconds * exported.sample_rate_hz) for seconds in SECONDS]
    turn = 0
    for length in lengths if exported.fixed_samples is None else [exported.fixed_samples]:
        for batch in BATCHES:
            chosen = [sounds[(turn + place) % len(sounds)] for place in range(batch)]
            turn += batch
            yield np.stack([np.resize(sound, length) for sound in chosen])


def _difference(found: np.ndarray, wanted: np.ndarray) -> Difference:
    if found.shape != wanted.shape:
        raise PipelineError(
            f"the exported model gives {found.shape} where the checkpoint gives {wanted.shape}. Nothing was written"
        )
    absolute = np.abs(found - wanted).max(axis=1)  # (batch,)
    relative = absolute / np.maximum(np.ptp(wanted, axis=1), _SMALLEST_SPREAD)
    return Difference(float(absolute.max()), float(relative.max()))
