"""What a model makes of a clip on its way to the logits: layers by name → one vector a clip."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

import student
from pipeline.errors import UsageError
from pipeline.models.device import Precision
from pipeline.models.hearing import tag_waveforms

if TYPE_CHECKING:
    import teacher

PENULTIMATE = "penultimate"
ALIASES = {"efficientat": "b5+b11+b13+b15+se5+se11+se13+se15"}
"""The embedding of EfficientAT's authors: block outputs and squeeze-excitation vectors (arXiv:2303.01879)."""

_LAYER = re.compile(r"penultimate|features|logits|mels|(?P<kind>b|se)(?P<block>\d+)")


class Embedder(nn.Module):
    """A model that gives embeddings in place of logits: some of its layers side by side.

    Args:
        network: a student or a teacher, in evaluation mode; it stays as it is.
        layers: names of layers joined by `+`, or one of `ALIASES`; `docs/embeddings.md` lists them.
        name: the model's, for messages.

    Raises:
        UsageError: the model has no such layer.
    """

    def __init__(self, network: nn.Module, layers: str = PENULTIMATE, name: str = "the model") -> None:
        super().__init__()
        self.network = network
        self.layers = ALIASES.get(layers, layers).split("+")
        for layer in self.layers:
            _check_layer(network, layer, name)
        shortest = torch.zeros(1, round(0.5 * self.sample_rate_hz), device=next(network.parameters()).device)
        self.size = self(shortest).shape[1]

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms, in hertz."""
        return self.network.sample_rate_hz  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, precision: Precision = "float32") -> Tensor:
        """Returns the layers' vectors side by side: (batch, size), float32.

        Args:
            waveforms: (batch, samples), on the model's device.
            lengths: as for `tag_waveforms`.
            precision: other than float32 means autocast around the network.
        """
        if isinstance(self.network, student.Tagger):
            return torch.cat(_of_student(self.network, waveforms, self.layers, precision), dim=1)
        return torch.cat([_of_teacher(self.network, waveforms, lengths, one, precision) for one in self.layers], dim=1)


def _check_layer(network: nn.Module, layer: str, name: str) -> None:
    match = _LAYER.fullmatch(layer)
    if match is None:
        raise UsageError(
            f"--layer {layer}: no layer is called that; choose penultimate, features, logits, mels, b0, b1 … (blocks), "
            f"se4 … (squeeze-excitation), several joined by +, or {', '.join(ALIASES)}"
        )
    if isinstance(network, student.Tagger):
        blocks = network.blocks_in_order()
        number = int(match["block"] or 0)
        if number >= len(blocks):
            raise UsageError(f"--layer {layer}: the blocks of {name} are b0 to b{len(blocks) - 1}")
        if match["kind"] == "se" and not _squeezes(blocks[number]):
            having = [f"se{place}" for place, block in enumerate(blocks) if _squeezes(block)]
            raise UsageError(f"--layer {layer}: {name} squeezes its channels in {', '.join(having) or 'no block'}")
        return
    count = len(_blocks_of(network, name))
    if match["kind"] == "se" or layer in ("mels", "features"):
        raise UsageError(
            f"--layer {layer}: only students have that; {name} has penultimate, logits and b0 to b{count - 1}"
        )
    if int(match["block"] or 0) >= count:
        raise UsageError(f"--layer {layer}: the blocks of {name} are b0 to b{count - 1}")


def _blocks_of(network: nn.Module, name: str = "") -> Sequence[nn.Module]:
    import teacher

    if not isinstance(network, teacher.AudioTransformer):
        raise UsageError(f"{name} is somebody else's network, whose layers are not known; embed with a registered one")
    return list(network.blocks)


def _squeezes(block: nn.Module) -> list[nn.Module]:
    """Returns the first linear layer of a block's squeeze-excitation over channels, if it has one."""
    return [gate.fc1 for gate in block.modules() if isinstance(gate, student.SqueezeExcitation) and gate.axis == 1]


def _of_student(
    network: student.Tagger, waveforms: Tensor, layers: Sequence[str], precision: Precision
) -> list[Tensor]:
    features = network.front_end(waveforms)  # (batch, 1, mels, frames)
    blocks = network.blocks_in_order()
    wanted = [int(layer[1:]) for layer in layers if re.fullmatch(r"b\d+", layer)]
    squeezed = {layer: _squeezes(blocks[int(layer[2:])])[0] for layer in layers if layer.startswith("se")}
    with torch.autocast(waveforms.device.type, getattr(torch, precision), enabled=precision != "float32"):
        with _recorded(list(squeezed.values())) as heard:
            maps, found = network.run_blocks(features, wanted)
        made = {f"b{number}": output.mean(dim=(2, 3)) for number, output in found.items()}
        made |= {layer: heard[gate][0] for layer, gate in squeezed.items()}
        made |= {"features": maps.mean(dim=(2, 3)), "mels": features.mean(dim=(1, 3))}
        if "logits" in layers:
            made["logits"] = network.forward_head(maps)
        if PENULTIMATE in layers:
            made[PENULTIMATE] = network.forward_head(maps, pre_logits=True)
    return [made[layer].float() for layer in layers]


def _of_teacher(
    network: nn.Module, waveforms: Tensor, lengths: Tensor | None, layer: str, precision: Precision
) -> Tensor:
    if layer == "logits":
        return tag_waveforms(network, waveforms, lengths, precision)
    if layer == PENULTIMATE:
        with _without_classes(network):
            return tag_waveforms(network, waveforms, lengths, precision)
    block = _blocks_of(network)[int(layer[1:])]
    vectors = []
    for clip in range(len(waveforms)):  # a clip may go through in pieces, and pieces know no clip
        own = None if lengths is None else lengths[clip : clip + 1]
        with _recorded([block]) as heard:
            tag_waveforms(network, waveforms[clip : clip + 1], own, precision)
        tokens = torch.cat([output.flatten(0, 1) for output in heard[block]])  # (tokens, embed_dim)
        vectors.append(tokens.float().mean(dim=0))
    return torch.stack(vectors)


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Yields what modules give while the block runs, each time that they are called."""
    heard: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def record(module: nn.Module, inputs: object, output: Tensor) -> None:
        heard[module].append(output)

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_classes(network: nn.Module) -> Iterator[None]:
    """Have a teacher return what its classifier would be given, which is averaged over pieces as its logits are."""
    transformer = cast("teacher.AudioTransformer", network)
    classes, transformer.num_classes = transformer.num_classes, 0
    try:
        yield
    finally:
        transformer.num_classes = classes
