"""An ONNX file → the same with 8-bit integers, for which real sounds say how large each map becomes.

What is kept in float was measured (docs/results.md): the front end, and the arithmetic of fully connected layers, which
costs mAP in integers and saves nothing: their weights are 8-bit all the same.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

INTEGER_OPERATORS = ("Conv", "Relu")
"""A ReLU vanishes in the range of the convolution before it."""
_WEIGHT_OPERATORS = ("Gemm", "MatMul")
_SMALLEST_WEIGHTS = 1024
"""Fewer numbers aren't worth a scale."""
_AT_ONCE = 4
"""Sounds whose maps are held in memory together."""


def quantise(source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    """Write a file whose convolutions compute in 8-bit integers (QDQ, weights with a scale a channel).

    Args:
        source: what `write_onnx` wrote.
        target: the file to write; it may be the same.
        inputs: some of the file's, without their batch axis; the least and the largest value that they bring about in
            each map become the ends of its integers' range.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    with _quiet_quantiser():
        quantiser = QDQQuantizer(
            load_model_with_shape_infer(source),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=_ranges(source, inputs),
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=list(INTEGER_OPERATORS),
            extra_options={},
        )
        quantiser.quantize_model()
    model = quantiser.model.model
    _shrink_weights(model.graph)
    onnx.save(model, str(target))


def _ranges(source: Path, inputs: Sequence[np.ndarray]) -> Any:
    """Returns ONNX Runtime's table of each map's least and largest value."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    name = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            source,
            list(INTEGER_OPERATORS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for first in range(0, len(inputs), _AT_ONCE):
            some = _Inputs(name, inputs[first : first + _AT_ONCE])
            calibrator.collect_data(some)  # pyright: ignore[reportArgumentType]  # its base class can't be imported here
        return calibrator.compute_data()


class _Inputs:
    """Some inputs, one at a time, as ONNX Runtime's `CalibrationDataReader` hands them out."""

    def __init__(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        self._inputs = iter([{name: one[None]} for one in inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._inputs


def _shrink_weights(graph: "onnx.GraphProto") -> None:
    """Keep the weights of fully connected layers as 8-bit integers, a scale for each row, made floats when loaded."""
    from onnx import helper, numpy_helper

    constants = {one.name: one for one in graph.initializer if not one.name.startswith("front_end.")}
    used = {name for node in graph.node if node.op_type in _WEIGHT_OPERATORS for name in node.input}
    nodes = []
    for name in sorted(used & constants.keys()):
        weights = numpy_helper.to_array(constants[name])
        if weights.dtype != np.float32 or weights.ndim != 2 or weights.size < _SMALLEST_WEIGHTS:
            continue
        scales = np.maximum(np.abs(weights).max(axis=1), np.finfo(np.float32).tiny) / 127  # (rows,)
        integers = np.round(weights / scales[:, None]).astype(np.int8)
        graph.initializer.remove(constants[name])
        graph.initializer.append(numpy_helper.from_array(integers, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scales"], [name], axis=0))
    in_order = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(in_order)


@contextmanager
def _quiet_quantiser() -> Iterator[None]:
    """Keep out advice that does not hold for files of this project."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
