"""A model → one ONNX file: waveform in, logits, probabilities or embeddings out, all that it means in its metadata."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.exporting.exported_model import ExportedModel
from pipeline.exporting.metadata import ExportMetadata

OPSET = 18
"""The oldest that torch's exporter writes."""
EXPORTER = f"opset {OPSET}"


def write_onnx(exported: ExportedModel, metadata: ExportMetadata, path: Path) -> None:
    """Write the file; the batch of its input is free, and its length where the model's is.

    Args:
        exported: what the file computes.
        metadata: what it says of itself.
        path: where to; it is not looked at again here.
    """
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            exported,
            (exported.example(),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(exported.dynamic_shape(),),
            input_names=[exported.input_name],
            output_names=[exported.output],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata.to_properties())
    program.save(path, external_data=False)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep out what torch's exporter tells its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
