"""Files of weights, known by what they hold and not by their names; nothing that they bring along is run.

`student` and `teacher` don't import each other: this module is the same in both, to the letter.
"""

import argparse
import pickle
from contextlib import suppress
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
    with torch.serialization.safe_globals(PLAIN_VALUES):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            names: list[str] = []
            with suppress(Exception):  # a file that is no zip archive can't be asked
                names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            what = f" ({', '.join(names[:3])})" if names else ""
            raise ValueError(
                f"is damaged, or holds more than tensors and would run code when loaded{what}. Where it was made, save "
                "the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        except Exception as error:  # of the zip archive, of the pickle in it, of what that asks for
            raise ValueError(f"is no whole torch file ({error}); fetch or write it again") from error
