"""Files of weights, known by what they hold and not by their names; nothing that they bring along is run.

`student` and `teacher` don't import each other: this module is the same in both, to the letter.
"""

import argparse
import pickle
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

_NUMPYS_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NUMPYS_FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
_SCALAR = np.float64(0).__reduce__()[0]
_ARRAY = np.zeros(0).__reduce__()[0]
PLAIN_VALUES: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy before its version 2 wrote them
    _ARRAY,
    (_ARRAY, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in (*_NUMPYS_INTEGERS, *_NUMPYS_FLOATS, "str", "bytes")),
    argparse.Namespace,
]
"""What training scripts save beside a state dict, and what is no more than a value: numbers, arrays, settings."""

SETTINGS_OF = ("fairseq", "hydra", "lightning", "lightning_fabric", "omegaconf", "pytorch_lightning")
"""Packages whose objects are a training run's settings; they are skipped, and nothing of these packages is imported."""

_TYPES_IN_SETTINGS = ("typing.Any", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str")
_MAPPINGS_IN_SETTINGS = ("collections.defaultdict", "AttributeDict")
_WEIGHTS_IN_AN_ARCHIVE = (".pth", ".pt", ".ckpt")


class Skipped:
    """Stands where a file has an object of somebody's settings; it keeps nothing and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __setstate__(self, _: object) -> None: ...


class SkippedMapping:
    """Stands for a mapping of a class of its own, in whose place there is a plain one."""

    def __new__(cls, *_: object) -> dict:  # pyright: ignore[reportInconsistentConstructor]
        return {}


def read_weights(path: str | Path) -> tuple[object, dict[str, str]]:
    """Returns what a safetensors or torch file holds, on the CPU, and the text that a safetensors file carries.

    Raises:
        ValueError: the file is damaged, or needs code to be run; the message leaves out the file's name.
    """
    with Path(path).open("rb") as stream:
        start = stream.read(9)
    if start[8:] != b"{":  # safetensors files begin with the length of a JSON object, and that object
        return _read_torch(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"is no whole safetensors file ({error}); fetch or write it again") from error


def _read_torch(path: str | Path) -> object:
    file = _unpacked(path)
    with torch.serialization.safe_globals([*PLAIN_VALUES, *_skipped(_names_in(file))]):
        try:
            _rewind(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            names = _names_in(file)
            what = f" ({', '.join(names[:3])})" if names else ""
            raise ValueError(
                f"is damaged, or holds more than tensors and would run code when loaded{what}. Where it was made, save "
                "the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        except Exception as error:  # of the zip archive, of the pickle in it, of what that asks for
            raise ValueError(f"is no whole torch file ({error}); fetch or write it again") from error


def _names_in(file: Path | BytesIO) -> list[str]:
    """Returns the names in a file that are not allowed now; a file that is no zip archive can't be asked."""
    with suppress(Exception):
        _rewind(file)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return []


def _skipped(names: list[str]) -> list[tuple[type, str]]:
    """Returns which of a file's names stand for settings, each with what takes their place."""
    settings = {name for name in names if name.partition(".")[0] in SETTINGS_OF}
    types = {name for name in names if name in (*_TYPES_IN_SETTINGS, "collections.defaultdict")} if settings else set()
    return [
        (SkippedMapping if name.endswith(_MAPPINGS_IN_SETTINGS) else Skipped, name) for name in sorted(settings | types)
    ]


def _unpacked(path: str | Path) -> Path | BytesIO:
    """Returns the torch file itself, where it was released in a zip archive; torch's own files are such archives too.

    Raises:
        ValueError: the archive holds no file of weights, or several.
    """
    if not zipfile.is_zipfile(path):
        return Path(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return Path(path)
        weights = [name for name in names if name.endswith(_WEIGHTS_IN_AN_ARCHIVE) and "__MACOSX/" not in name]
        if len(weights) != 1:
            raise ValueError(f"is an archive with {len(weights)} files of weights; unpack it and give one of them")
        try:
            return BytesIO(archive.read(weights[0]))
        except Exception as error:  # of the archive and of what packs it
            raise ValueError(f"is no whole archive ({error}); fetch it again") from error


def _rewind(file: Path | BytesIO) -> None:
    if isinstance(file, BytesIO):
        file.seek(0)
