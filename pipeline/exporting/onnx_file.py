"""A model → one ONNX file: waveform in, logits, probabilities or embeddings out, all that it means in its metadata."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.exporting.exported_model import ExportedModel
from pipeline.exporting.metadata import ExportMetadata
from pipeline.exporting.quiet import quiet_exporter

OPSET = 18
"""The oldest that torch's exporter writes."""


def write_onnx(exported: ExportedModel, metadata: ExportMetadata, path: Path) -> None:
    """Write the file; the batch of its input is free, and its length where the model's is.

    Args:
        exported: what the file computes.
        metadata: what it says of itself.
        path: where to; it is not looked at again here.
    """
    with torch.no_grad(), quiet_exporter():
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


def add_properties(path: Path, properties: Mapping[str, str]) -> None:
    """Let a file say more of itself."""
    import onnx

    model = onnx.load(str(path))
    for key, value in properties.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
