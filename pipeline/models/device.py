"""Where models compute, and in which precision."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.models.nvidia_driver import why_torch_misses_a_gpu

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""In what the networks compute; front ends always compute in float32. tf32 is float32 whose products NVIDIA's GPUs
round to 10 bits first; elsewhere it is float32."""

PrecisionChoice = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
"""`auto` is what `fastest_precision` finds for teachers, and `training_precision` for what learns."""

_FASTEST_FIRST: tuple[Precision, ...] = ("bfloat16", "float16", "float32")


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, `mps` … into a device that works; `auto` takes a GPU if there is one.

    That is a GPU of NVIDIA's or AMD's (both `cuda` to torch) or Apple's (`mps`). A numbered one becomes this thread's
    own, so that nothing is put on the first one beside it.

    Raises:
        UsageError: there is no such device on this machine, or `auto` would pass over a GPU that torch can't use.
    """
    if name == "auto":
        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        found = next((kind for kind, is_available in there.items() if is_available()), "cpu")
        if found == "cpu" and (reason := why_torch_misses_a_gpu()):
            raise UsageError(f"--device auto: {reason}; or go on without it by --device cpu")
        return torch.device(found)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        why = (why_torch_misses_a_gpu() if name.startswith("cuda") else "") or reason
        raise UsageError(f"--device {name}: not usable on this machine; choose auto or cpu ({why})") from error
    return device


def fastest_precision(device: torch.device | str) -> Precision:
    """Returns the fastest precision of a device whose effect on the logits was measured as harmless.

    That is bfloat16 where the device has instructions for it: its 99.9th percentile of |difference| to float32 is below
    0.05, 0.03 at most of the teachers that `benchmarks.precision` has measured. Older GPUs multiply float16 as fast,
    which lies closer to float32 still. Other CPUs would only imitate either, slower than they compute in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        # ARM has other names for its units; what they gain has not been measured.
        able = torch.cpu.get_capabilities()
        return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    return "float32"


def training_precision(choice: PrecisionChoice, device: torch.device) -> Precision:
    """Returns what is chosen to train in; `auto` is bfloat16 on GPUs that have instructions for it, else float32."""
    if choice != "auto":
        return choice
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"


def common_precision(fastest: Iterable[Precision]) -> Precision:
    """Returns the precision for machines whose fastest ones differ: the one that none of them has to imitate."""
    return max(fastest, key=_FASTEST_FIRST.index)


def tensor_dtype(precision: Precision) -> torch.dtype:
    """Returns in what tensors are kept for a precision."""
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """Returns a context in which networks compute in a precision; see `compute_in` for tf32."""
    dtype = tensor_dtype(precision)
    lower = dtype != torch.float32
    return torch.autocast(device_type, dtype if lower else None, enabled=lower)


def compute_in(precision: Precision, models: Iterable[nn.Module]) -> None:
    """Let float32 mean float32 in this process, and tf32 TF32 in the networks of some models but not in front ends.

    torch by itself rounds what cuDNN convolves to TF32, and what cuBLAS multiplies not.

    Args:
        precision: what networks compute in.
        models: each with a `front_end`.
    """
    _allow_tf32(precision == "tf32")
    if precision != "tf32":
        return
    for model in models:
        front_end = model.get_submodule("front_end")
        front_end.register_forward_pre_hook(lambda *_: _allow_tf32(False))
        front_end.register_forward_hook(lambda *_: _allow_tf32(True), always_call=True)


def still_works(device: str) -> bool:
    """Whether a device computes: after some errors a GPU refuses everything that the process still asks of it."""
    if not device.startswith("cuda"):
        return True
    try:
        return torch.ones(1, device=device).add_(1).item() == 2
    except (RuntimeError, AssertionError):
        return False


def repeat_exactly() -> None:
    """Let this process compute the same bits each time, on a GPU too; what can't be computed so is refused."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product; see torch's notes
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def device_name(device: torch.device | str) -> str:
    """Returns what a device is called by its maker, such as `NVIDIA H100 80GB HBM3`, or a processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
