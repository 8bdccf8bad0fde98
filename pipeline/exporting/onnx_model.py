"""An exported ONNX file, run by ONNX Runtime; torch is not imported."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import CheckpointError, UsageError
from pipeline.exporting.metadata import ExportMetadata
from pipeline.models.weights import Task, local_file
from pipeline.redaction import redact
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.extras import check_packages

if TYPE_CHECKING:
    import onnxruntime


def open_session(path: Path, location: str, device: str = "cpu") -> "onnxruntime.InferenceSession":
    """Open an ONNX file.

    Args:
        path: the file, on this machine.
        location: what messages call it.
        device: cpu, cuda, cuda:1 …; auto takes a GPU where this ONNX Runtime has one.

    Raises:
        UsageError: ONNX Runtime is not installed, or has no such device.
        CheckpointError: the file is damaged or no ONNX file.
    """
    check_packages(location, "onnxruntime", extra="export")
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what it says is in the exceptions, too
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=_providers(device))
    except UsageError:
        raise
    except Exception as error:  # its exceptions have no base of their own
        raise CheckpointError(f"{location}: no whole ONNX file that ONNX Runtime can run ({_told(error)})") from error


def _providers(device: str) -> list[str | tuple[str, dict[str, int]]]:
    import onnxruntime

    kind, _, number = device.partition(":")
    has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if kind == "cpu" or (kind == "auto" and not has_gpu):
        return ["CPUExecutionProvider"]
    if kind not in ("auto", "cuda") or not has_gpu:
        raise UsageError(
            f"--device {device}: this ONNX Runtime has no such device; choose cpu, or install onnxruntime-gpu"
        )
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"]


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class OnnxModel:
    """An exported model that tags windows of sound, as `pipeline.scoring.listening.WindowModel` describes it.

    Args:
        location: the file, a path or URL.
        device: where it runs.

    Raises:
        UsageError: ONNX Runtime is not installed, or the file does something else than to tag sounds.
        CheckpointError: the file is missing or damaged, or does not say which classes it knows.
    """

    frame_samples: int | None = None
    is_fully_convolutional = False

    def __init__(self, location: str, device: str = "cpu") -> None:
        with local_file(location) as path:
            self.name = path.stem
            self._location = redact(location)
            self._session = open_session(path, self._location, device)
        self.on_gpu = "CUDAExecutionProvider" in self._session.get_providers()
        self.metadata = ExportMetadata.read(self._session.get_modelmeta().custom_metadata_map, self._location)
        if self.metadata.output == "embeddings" or self.metadata.front_end == "outside":
            wrong = "gives embeddings" if self.metadata.output == "embeddings" else "takes log-mel images"
            raise UsageError(f"{self._location}: {wrong}, not tags of sounds; export it without that")
        self.vocabulary = self.metadata.vocabulary(self._location)
        self.task: Task = self.metadata.task
        self.sample_rate_hz = self.metadata.sample_rate_hz
        self.input_seconds = self.metadata.input_seconds
        (only,) = self._session.get_inputs()
        self._input = only.name
        is_fixed = isinstance(only.shape[1], int)
        self._shortest = only.shape[1] if is_fixed else self.metadata.shortest_samples
        self.longest_seconds = self._shortest / self.sample_rate_hz if is_fixed else math.inf

    def logits(self, windows: np.ndarray) -> np.ndarray:
        """Returns the logits of the classes in windows of one length, (batch, samples) float32 → (batch, classes).

        Raises:
            CheckpointError: ONNX Runtime can't run the file, or it gives something else than logits of its classes.
        """
        missing = max(0, self._shortest - windows.shape[1])
        waveforms = np.pad(windows, ((0, 0), (0, missing))).astype(np.float32, copy=False)
        try:
            (found,) = self._session.run([self.metadata.output], {self._input: waveforms})
        except Exception as error:
            raise CheckpointError(f"{self._location}: ONNX Runtime can't run it ({_told(error)})") from error
        scores = np.asarray(found)
        if scores.shape != (len(windows), len(self.vocabulary)):
            raise CheckpointError(
                f"{self._location}: gives {scores.shape} for {len(windows)} sounds and {len(self.vocabulary)} classes"
            )
        return scores if self.metadata.output == "logits" else logits_of(scores, self.task)

    def frame_logits(self, windows: np.ndarray) -> np.ndarray:
        """Refuse.

        Raises:
            CheckpointError: always, for the file gives one answer a window.
        """
        raise CheckpointError(f"{self._location}: an exported file has no timeline of its own; use --window and --hop")


def logits_of(probabilities: np.ndarray, task: str) -> np.ndarray:
    """Returns finite numbers whose sigmoid, or softmax, the probabilities are: (batch, classes) both."""
    smallest = np.finfo(np.float32).tiny
    probabilities = probabilities.astype(np.float64)
    logs = np.log(np.maximum(probabilities, smallest))
    return logs if task == "single-label" else logs - np.log(np.maximum(1 - probabilities, 1e-9))
