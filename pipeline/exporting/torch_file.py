"""A model → a file of `torch.export`: for hosts that have torch, but not this package."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.exporting.exported_model import ExportedModel
from pipeline.exporting.metadata import ExportMetadata
from pipeline.exporting.quiet import quiet_exporter

METADATA_NAME = "metadata.json"
"""Of the file's extra file, which `torch.export.load(…, extra_files={"metadata.json": ""})` reads."""


def write_pt2(exported: ExportedModel, metadata: ExportMetadata, path: Path) -> None:
    """Write the file; the batch of its input is free, and its length where the model's is.

    Args:
        exported: what the file computes.
        metadata: what it says of itself.
        path: where to; it is not looked at again here.
    """
    with torch.no_grad(), quiet_exporter():
        # Which layout is channels-last depends on whether an axis has one place, and would be a limit of the file's.
        plain = copy.deepcopy(exported).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        program = torch.export.export(plain, (exported.example(),), dynamic_shapes=(exported.dynamic_shape(),))
        # With an example a file refuses what the tracer took for granted of its strides, such as a batch of one.
        program.example_inputs = None
        told = json.dumps(metadata.to_properties(), ensure_ascii=False)
        # To memory first: torch's own writer takes the whole process along where a disk has no room.
        torch.export.save(program, content := io.BytesIO(), extra_files={METADATA_NAME: told})
    path.write_bytes(content.getbuffer())


def pt2_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what runs such a file, which was just written here."""
    with quiet_exporter():
        module = torch.export.load(path).module()

    def run(given: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(given)).numpy()

    return run
