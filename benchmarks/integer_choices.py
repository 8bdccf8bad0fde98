"""What each choice of `pipeline export --int8` brings: mAP, how far the logits move, and the file's size.

    python -m benchmarks.integer_choices RUN --data EVALUATION --calibration-data TRAINING [--sounds 48]

RUN is a student's checkpoint. The network alone is quantised, in ways that ONNX Runtime's quantiser has, and then as
the product does it; the float file is the baseline. Moved is the mean difference of the logits from float.
"""

import argparse
import ast
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

import student
from pipeline.dataset.manifest import read_manifest
from pipeline.exporting.comparing import Runner, onnx_runner
from pipeline.exporting.exported_model import ExportedModel, describe
from pipeline.exporting.map_loss import measure_map_loss
from pipeline.exporting.onnx_file import write_onnx
from pipeline.exporting.quantising import quantise
from pipeline.exporting.sounds import check_sounds
from pipeline.models.loading import load_model

CONVOLUTIONS = ("Conv", "Relu")
LAYERS = (*CONVOLUTIONS, "Gemm")
ALL = (*LAYERS, "Add", "Mul", "HardSwish", "Sigmoid", "ReduceMean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to quantise."""

    operators: Sequence[str] = CONVOLUTIONS
    per_channel: bool = True
    method: CalibrationMethod = CalibrationMethod.MinMax
    maps: QuantType = QuantType.QUInt8
    in_float: str = ""
    """Part of the network that stays as it is: a name of `nodes_of`."""
    more: dict[str, Any] = field(default_factory=dict)


MOVING = {"CalibMovingAverage": True, "CalibMovingAverageConstant": 0.1}
SYMMETRIC = {"ActivationSymmetric": True}
PERCENTILE = {"CalibPercentile": 99.99}
CHOICES = {
    "convolutions and fully connected layers": Choice(operators=LAYERS),
    "… ranges before a ReLU kept apart": Choice(operators=("Conv", "Gemm")),
    "… squeeze-excitation in float": Choice(operators=LAYERS, in_float="squeeze-excitation"),
    "… additions, products and activations, too": Choice(operators=ALL),
    "convolutions alone": Choice(),
    "… one scale for all channels of a layer": Choice(per_channel=False),
    "… ranges from percentiles (99.99 %)": Choice(method=CalibrationMethod.Percentile, more=PERCENTILE),
    "… ranges from moving averages": Choice(more=MOVING),
    "… the first convolution in float": Choice(in_float="first"),
    "… depthwise convolutions in float": Choice(in_float="depthwise"),
    "… maps symmetric around 0": Choice(maps=QuantType.QInt8, more=SYMMETRIC),
    "… maps in 16 bits": Choice(maps=QuantType.QUInt16),
}


def nodes_of(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Returns parts of a network: name → its nodes' names in the file."""
    parts: dict[str, list[str]] = {"": [], "squeeze-excitation": [], "first": [], "depthwise": []}
    for node in model.graph.node:
        told = [one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"]
        scopes = [str(scope) for scope in (ast.literal_eval(told[0]) if told else [])]
        if any("conc_se" in scope for scope in scopes):
            parts["squeeze-excitation"].append(node.name)
        if any(scope.endswith("features.0") for scope in scopes):
            parts["first"].append(node.name)
        if node.op_type == "Conv" and any(one.name == "group" and one.i > 1 for one in node.attribute):
            parts["depthwise"].append(node.name)
    return parts


class _Inputs(CalibrationDataReader):
    def __init__(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        self._inputs: Iterator[dict[str, np.ndarray]] = iter([{name: one[None]} for one in inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def quantise_as(choice: Choice, source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    """Write a file with ONNX Runtime's quantiser, see `pipeline.exporting.quantising.quantise`."""
    model = onnx.load(str(source))
    quantize_static(
        source,
        target,
        _Inputs(model.graph.input[0].name, inputs),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(choice.operators),
        nodes_to_exclude=nodes_of(model)[choice.in_float],
        per_channel=choice.per_channel,
        activation_type=choice.maps,
        weight_type=QuantType.QInt8,
        calibrate_method=choice.method,
        extra_options=choice.more,
    )


def heard_by(run: Runner, heard: list[np.ndarray]) -> Runner:
    """Returns a runner that also keeps what it is given."""

    def keep(given: np.ndarray) -> np.ndarray:
        heard.append(given.copy())
        return run(given)

    return keep


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration-data", required=True)
    parser.add_argument("--sounds", type=int, default=48)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    manifest = read_manifest(options.data)
    model = load_model(options.checkpoint, manifest)
    exported = ExportedModel(model, "logits", "outside")
    sounds = check_sounds(options.calibration_data, model.sample_rate_hz, max_sounds=options.sounds)
    inputs = [exported.input_of(waveform) for waveform in sounds.waveforms]
    ways: dict[str, Callable[..., None]] = {name: partial(quantise_as, choice) for name, choice in CHOICES.items()}
    ways["**as the product does it**"] = quantise
    with tempfile.TemporaryDirectory() as folder:
        plain, file = Path(folder) / "float.onnx", Path(folder) / "integers.onnx"
        write_onnx(exported, describe(model, exported, licence=None, exporter=""), plain)
        batches: list[np.ndarray] = []
        measured = measure_map_loss(heard_by(onnx_runner(plain), batches), exported, model, manifest)
        labels = manifest.label_matrix(np.arange(measured.clips))
        print(f"\n{model.name}: {measured.clips} clips of {options.data}, ranges from {sounds.origin}\n")
        print("| in 8-bit integers | mAP | moved | file, MB |\n|---|---:|---:|---:|")
        plain_logits = np.concatenate([onnx_runner(plain)(batch) for batch in batches])
        print(f"| nothing (baseline) | {measured.after:.4f} | | {plain.stat().st_size / 1e6:.2f} |", flush=True)
        for name, write in ways.items():
            with redirect_stdout(io.StringIO()):  # ONNX Runtime's
                write(plain, file, inputs)
            logits = np.concatenate([onnx_runner(file)(batch) for batch in batches])
            score = student.tagging_scores(logits, labels).mean_average_precision
            moved = np.abs(logits - plain_logits).mean()
            print(f"| {name} | {score:.4f} | {moved:.2f} | {file.stat().st_size / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
