"""Measures how far each precision's logits lie from float32's, on the clips of any dataset with labels.

    pipeline ingest audioset --segments manifests/sample/eval_segments.csv --audio manifests/sample/audio --out DATASET
    python -m benchmarks.precision --data DATASET --teacher passt_tiny=manifests/sample/passt_tiny.safetensors
    python -m benchmarks.precision --data DATASET --teacher passt_s_swa_p16_128_ap476 --clips 8

A teacher without a checkpoint gets random weights whose logits spread by about 1. The differences are then those of its
size and depth; the mAP is that of chance and is not shown.

Only NVIDIA's GPUs compute in TF32. Elsewhere its rounding is imitated: what the networks multiply is rounded to TF32's
10 bits first, and summed in float32, as a GPU does it.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import teacher
from pipeline.dataset.audio import load_whole_waveforms
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import read_clip_bytes
from pipeline.models.device import Precision, compute_in, tensor_dtype
from pipeline.runtime.memory import keep_freed_memory
from pipeline.storage import files as storage
from student import tagging_scores

PRECISIONS: tuple[Precision, ...] = ("tf32", "bfloat16", "float16")

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_convolution", "_linear_pointwise")
ATTENTION = "_scaled_dot_product"
"""Operators, or how they begin, whose operands a GPU rounds."""


def to_tf32(values: Tensor) -> Tensor:
    """Round float32 to the 10 bits of TF32's mantissa, halves to even."""
    bits = values.contiguous().view(torch.int32)
    odd = (bits >> 13) & 1  # the last bit that stays
    return ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)


class Tf32Products(TorchDispatchMode):
    """Rounds the operands of products, but for those of a network's front end."""

    def __init__(self, network: teacher.AudioTransformer) -> None:
        super().__init__()
        self.applies = True
        network.front_end.register_forward_pre_hook(lambda *_: self.apply(False))
        network.front_end.register_forward_hook(lambda *_: self.apply(True))
        with torch.no_grad():  # a linear layer may hide its weights in oneDNN's order
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(to_tf32(layer.weight))

    def apply(self, applies: bool) -> None:
        """Round from now on, or don't."""
        self.applies = applies

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call an operator with what it multiplies rounded."""
        name = func.overloadpacket.__name__
        if self.applies and (name in PRODUCTS or name.startswith(ATTENTION)):
            args = tree_map_only(Tensor, lambda value: value if value.is_mkldnn else to_tf32(value), args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Deviation:
    """|Difference| in logits between a precision and float32, over clips and classes."""

    median: float
    p999: float
    largest: float

    @classmethod
    def between(cls, found: Tensor, exact: Tensor) -> "Deviation":
        """Compare two (clips, classes) tensors."""
        difference = (found - exact).abs().flatten().double().cpu().numpy()
        return cls(*np.quantile(difference, [0.5, 0.999, 1.0]).tolist())


def build(text: str) -> teacher.AudioTransformer:
    """Build the teacher that NAME=CHECKPOINT or NAME alone spells."""
    name, _, checkpoint = text.partition("=")
    if checkpoint:
        return teacher.create_model(name, checkpoint)
    network = teacher.create_model(name)
    fill(network)
    return network


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Draw weights that keep the size of what goes through a layer, as trained ones roughly do."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ("embed" in name and "proj" not in name) or "token" in name or name.endswith("bias"):
            parameter.copy_(0.02 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def read_waveforms(manifest: Manifest, rows: np.ndarray, network: teacher.AudioTransformer) -> tuple[Tensor, Tensor]:
    """Decode clips as stage 1 does, as long as they are.

    Returns:
        (clips, samples), silence after each clip's end; (clips,), how many samples it has.
    """
    rate, seconds = network.sample_rate_hz, network.front_end.longest_seconds
    reader = storage.RangeReader(manifest.location)
    waveforms = [
        load_whole_waveforms(read_clip_bytes(reader, manifest, row), sample_rates_hz=[rate], max_seconds=seconds)[rate]
        for row in rows.tolist()
    ]
    reader.close()
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True), lengths


def logits_of(
    text: str, waveforms: Tensor, lengths: Tensor, precision: Precision, *, batch: int, device: str
) -> Tensor:
    """(clips, classes): what stage 1 would store, before rounding to float16."""
    network = build(text).to(device)
    compute_in(precision, [network])
    imitated = precision == "tf32" and device == "cpu"
    rate = network.sample_rate_hz
    with Tf32Products(network) if imitated else nullcontext():
        ensemble = teacher.Ensemble([network], [1.0], tensor_dtype(precision))
        pieces = [
            ensemble({rate: some[:, : its.max()].to(device)}, None, {rate: its})[0].cpu()
            for some, its in zip(waveforms.split(batch), lengths.split(batch), strict=True)
        ]
    return torch.cat(pieces)


def main() -> None:
    """Print one row a teacher and precision, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="dataset folder")
    parser.add_argument("--teacher", nargs="+", required=True, metavar="NAME[=CHECKPOINT]")
    parser.add_argument("--clips", type=int, default=0, help="so many, evenly spread over the dataset; 0 is all")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch", type=int, default=8, help="clips a forward pass")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    keep_freed_memory()
    manifest = read_manifest(options.data)
    count = min(options.clips or len(manifest), len(manifest))
    rows = np.linspace(0, len(manifest) - 1, count).round().astype(np.int64)
    targets = manifest.label_matrix(rows)
    print(f"{count} clips of {manifest.location}; |difference| of the logits to float32\n")
    print(
        "| teacher | precision | median | 99.9th percentile | largest | spread of the logits | mAP, float32 | change |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for text in options.teacher:
        waveforms, lengths = read_waveforms(manifest, rows, build(text))
        logits = partial(logits_of, text, waveforms, lengths, batch=options.batch, device=options.device)
        exact = logits("float32")
        for precision in options.precision:
            found = logits(precision)
            deviation = Deviation.between(found, exact)
            before, after = "-", "-"
            if "=" in text:
                score = tagging_scores(exact.numpy(), targets).mean_average_precision
                change = tagging_scores(found.numpy(), targets).mean_average_precision - score
                before, after = f"{score:.4f}", f"{change:+.5f}"
            print(
                f"| {text.partition('=')[0]} | {precision} | {deviation.median:.4f} | {deviation.p999:.4f} "
                f"| {deviation.largest:.4f} | {exact.std().item():.2f} | {before} | {after} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
