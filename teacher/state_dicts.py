"""Checkpoints of every spelling → the key names of our models, and a clear word when one doesn't fit.

| written by | looks like | here |
|---|---|---|
| PaSST | `blocks.0.…`, `head.0.…`, `head_dist.…` | as it is, without the unused `head_dist` |
| its Lightning runs, hear21passt | `net.…`, `model.net.…`, averaged weights `net_swa.…` | averaged weights first |
| AST | `module.v.blocks.0.…`, `module.mlp_head.0.…` | without the unused ImageNet heads |
| Hugging Face AST | `….encoder.layer.0.attention.attention.query.…`, 5.x `….layers.0.attention.q_proj.…` | one `qkv` |
| CED and its Hugging Face form | `init_bn.1.…`, `outputlayer.0.…`, `encoder.…` | without the front end's constants |
| EAT, SSLAM | `model.modality_encoders.IMAGE.…`, `model.blocks.…`, `fc_norm.…` | the encodings of its ten seconds |
| BEATs | `patch_embedding.…`, `encoder.layers.0.self_attn.…`, `predictor.…` | one `qkv`; AudioSet's order of classes |
| M2D | `module.ar.runtime.backbone.…`, `module.head.mlp.mlp.0.…` | without the front end's constants |
| ATST | `encoder.encoder.…`, `head.linear.…` | without what training alone uses |
| this project | our own names, settings in the safetensors metadata, often float16 | float32 |

The families behind the first five rows keep timm's names, which one table here translates; the others' tables stand in
their modules. Nothing that executes is read: safetensors, or torch files with `weights_only=True`.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from teacher import atst, beats, eat, m2d
from teacher.weight_files import read_weights

logger = logging.getLogger(__name__)

CLASSIFIER = ("head.1.weight", "head.1.bias")
"""Our names for the last layer, whose size is the number of classes."""

_SPELLINGS = (eat.SPELLING, beats.SPELLING, m2d.SPELLING, atst.SPELLING)
_FILES_IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")
_NESTED = ("state_dict", "model")

# What stands before this key is the network's own prefix in the file.
_ANCHOR = re.compile(r"(?P<prefix>.*?)(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")
# Inside the prefix, these belong to the network and not to what wraps it: AST's `v.`, Hugging Face's two.
_BODY = re.compile(r"(?:^|(?<=\.))(?:v|encoder|audio_spectrogram_transformer)\.$")

_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:mlp_head|outputlayer)\.", "head."),
        (r"^classifier\.layernorm\.", "head.0."),
        (r"^classifier\.dense\.", "head.1."),
        (r"^init_bn\.1\.", "init_bn."),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^(?:encoder\.layer|layers)\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
)
# Classifiers that no forward pass uses (inside the body, AST's two for ImageNet), and front ends' constants.
_UNUSED = ("head_dist.", "front_end.")
_UNUSED_IN_BODY = ("head.", *_UNUSED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint's tensors under our names, in float32, and what its writer said about it."""

    source: str
    """Where it came from, for messages."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """Text that a safetensors file carries; empty for every other kind."""

    @property
    def num_classes(self) -> int | None:
        """Classes of its last layer; None where it has no such layer."""
        weight = self.tensors.get(CLASSIFIER[0])
        return None if weight is None else len(weight)


def read_checkpoint(source: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Read a file (safetensors, torch), a folder of Hugging Face's, or a mapping, in any known spelling.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, needs code to be loaded, or holds no audio transformer.
    """
    if isinstance(source, Mapping):
        where, tensors, metadata = "the given mapping", dict(source), {}
    else:
        path = _file_in(Path(source))
        where = str(path)
        tensors, metadata = _read_file(path)
    return Checkpoint(source=where, tensors=to_our_names(tensors, where), metadata=metadata)


def to_our_names(
    tensors: Mapping[str, object], where: str, beside: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """Translate the keys of any known spelling; floating-point values become float32 copies.

    Args:
        tensors: the state dict, or what has it under a usual name.
        where: it comes from, for messages.
        beside: what the file holds beside the state dict.

    Raises:
        ValueError: no key is a patch embedding's, so this is no audio transformer.
    """
    for name in _NESTED:
        if isinstance(inner := tensors.get(name), Mapping):
            return to_our_names(inner, where, tensors)
    for spelling in _SPELLINGS:
        if (prefix := spelling.prefix(tensors)) is not None:
            network = _network(tensors, prefix)
            return {key: _exact(value) for key, value in spelling.translate(network, beside or {}).items()}
    wrapper, body = _prefixes(tensors, where)
    ours: dict[str, Tensor] = {}
    for key, value in _network(tensors, wrapper).items():
        inside = bool(body) and key.startswith(body)
        key = key.removeprefix(body)
        if key.startswith(_UNUSED_IN_BODY if inside else _UNUSED):
            continue
        for pattern, name in _RENAMED:
            key = pattern.sub(name, key)
        ours[key] = _exact(value)
    return _fuse_qkv(ours)


def _network(tensors: Mapping[str, object], wrapper: str) -> dict[str, Tensor]:
    """Returns what stands behind the wrapper's name, without another copy of averaged weights or a wrapper's state."""
    return {
        key.removeprefix(wrapper): value
        for key, value in tensors.items()
        if key.startswith(wrapper) and isinstance(value, Tensor)
    }


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32, copy=True) if value.is_floating_point() else value


def check_fit(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], name: str, fits: Iterable[str]) -> None:
    """Refuse a checkpoint whose keys or shapes differ from the model's.

    Args:
        checkpoint: what was read.
        expected: the model's keys and shapes.
        name: the model's registered name.
        fits: registered names whose keys and shapes the checkpoint does have; read only when it doesn't fit.

    Raises:
        ValueError: it says which keys and shapes differ, and which model the checkpoint is for.
    """
    found = shapes_of(checkpoint.tensors)
    differences = [
        f"{key} has shape {found[key]}, {name} needs {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    differences += [f"{key} is missing" for key in expected if key not in found]
    differences += [f"{key} is unknown to {name}" for key in found if key not in expected]
    if not differences:
        return
    shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
    names = ", ".join(fits)
    advice = f"It looks like {names}." if names else "It fits no registered model."
    raise ValueError(f"{checkpoint.source}: does not fit {name}: {len(differences)} keys differ: {shown}. {advice}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key → shape."""
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _file_in(path: Path) -> Path:
    if path.is_dir():
        for name in _FILES_IN_A_FOLDER:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path}: holds none of {', '.join(_FILES_IN_A_FOLDER)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def _read_file(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    try:
        content, metadata = read_weights(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a mapping of names to tensors")
    return dict(content), metadata


def _prefixes(tensors: Mapping[str, object], where: str) -> tuple[str, str]:
    """Find what wraps the network in the file (`module.`, `net_swa.`) and what it calls its body (`v.`, `encoder.`)."""
    prefixes = [match["prefix"] for key in tensors if (match := _ANCHOR.fullmatch(key))]
    if not prefixes:
        begins = ", ".join(list(tensors)[:3]) or "nothing"
        raise ValueError(
            f"{where}: no key ends in patch_embed.proj.weight, so it is of no known family; it has {begins}"
        )
    prefix = max(prefixes, key=lambda prefix: "swa" in prefix)
    body = match[0] if (match := _BODY.search(prefix)) else ""
    wrapper = prefix.removesuffix(body)
    if len(prefixes) > 1:
        logger.info("%s: took the weights under %r, left those under %r", where, prefix, sorted({*prefixes} - {prefix}))
    return wrapper, body


def _fuse_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay separate query, key and value projections on top of each other, as timm's attention holds them."""
    for query in [key for key in tensors if ".attn.q." in key]:
        parts = [query.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if all(part in tensors for part in parts):
            tensors[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensors.pop(part) for part in parts])
    return tensors
