"""What NVIDIA's driver says of a machine's GPUs, for when torch does not see them."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

NEWEST_DRIVER = 580
"""What torch's ordinary wheels need, those of CUDA 13: this driver or a newer one, and a GPU of Turing's kind (2018) or
a newer one. See NVIDIA's release notes of CUDA 13.0, "CUDA Driver" and "Deprecated architectures"."""
_NONE = ("", "-1", "none", "void", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; the last one is Slurm's."""
_ANSWER_SECONDS = 20.0
_QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")


@dataclass(frozen=True, slots=True)
class DriverReport:
    """GPUs that a driver shows."""

    gpus: tuple[str, ...]
    """Their names, or how many there are."""
    version: str
    """The driver's, such as 535.183.01; `unknown` where it does not say."""


def why_torch_misses_a_gpu(root: Path = Path("/")) -> str:
    """Returns why torch can't use a GPU that NVIDIA's driver shows, and what to do; empty where it shows none.

    GPUs that somebody hid, all of them, by CUDA_VISIBLE_DEVICES are not missed.

    Args:
        root: where `/proc` and `/dev` lie.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in _NONE or torch.version.hip:
        return ""
    report = ask_driver(root)
    if report is None:
        return ""
    shown = f"NVIDIA's driver {report.version} shows {', '.join(report.gpus)}, which this torch can't use"
    if torch.version.cuda is None:
        return f"{shown}: it was installed without CUDA. Install the ordinary wheels of torch {torch.__version__}"
    with suppress(ValueError):
        if int(report.version.split(".")[0]) < NEWEST_DRIVER and int(torch.version.cuda.split(".")[0]) >= 13:
            return (
                f"{shown}: it is built with CUDA {torch.version.cuda}, which needs driver {NEWEST_DRIVER} or newer. "
                "Install a newer driver, or the wheels of torch for an older CUDA (`uv pip install --torch-backend "
                "auto torch torchaudio torchvision` takes those that fit)"
            )
    return f"{shown} ({_reason()}). Mend the driver, or the wheels of torch for CUDA {torch.version.cuda}"


def ask_driver(root: Path = Path("/")) -> DriverReport | None:
    """Returns which GPUs the driver shows to this process; None where there is no driver, or it shows none."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_ANSWER_SECONDS)
            rows = [line.rsplit(", ", 1) for line in said.stdout.splitlines() if said.returncode == 0]
            if rows and all(len(row) == 2 for row in rows):
                return DriverReport(tuple(name for name, _ in rows), rows[0][1])
    # A container sees its host's /proc, but only the devices that it was given.
    devices = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if not devices:
        return None
    found = None
    with suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", (root / "proc/driver/nvidia/version").read_text(encoding="utf-8"))
    return DriverReport((f"{len(devices)} GPU{'s' if len(devices) > 1 else ''}",), found[0] if found else "unknown")


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it finds no device"
