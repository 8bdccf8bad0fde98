"""Where models compute, and in which precision."""

from typing import Literal

import torch

from pipeline.errors import UsageError

Precision = Literal["float32", "bfloat16", "float16"]
"""In what the networks compute; front ends always compute in float32."""

PrecisionChoice = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto` is what `fastest_precision` finds."""


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, `mps` … into a device that is there; `auto` takes a GPU if there is one.

    That is a GPU of NVIDIA's or AMD's (both `cuda` to torch) or Apple's (`mps`).

    Raises:
        UsageError: there is no such device on this machine.
    """
    if name == "auto":
        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        return torch.device(next((kind for kind, is_available in there.items() if is_available()), "cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not usable on this machine; choose auto or cpu ({reason})") from error
    return device


def fastest_precision(device: torch.device | str) -> Precision:
    """Returns the fastest precision of a device whose effect on the logits was measured as harmless.

    That is bfloat16 where the device has instructions for it: its 99.9th percentile of |difference| to float32 is below
    0.02, measured by `benchmarks.precision`. Older GPUs multiply float16 as fast, which lies closer to float32 still.
    Other CPUs would only imitate either, slower than they compute in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        # ARM has other names for its units; what they gain has not been measured.
        able = torch.cpu.get_capabilities()
        return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    return "float32"
