from pathlib import Path

import pytest
import torch

from pipeline.models.nvidia_driver import DriverReport, ask_driver, why_torch_misses_a_gpu

VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: gcc 12.2.0\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, and no program that tells of them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(VERSION)
    return tmp_path


def test_the_kernel_tells_of_the_driver_where_no_program_does(root: Path) -> None:
    assert ask_driver(root) == DriverReport(("2 GPUs",), "570.86.15")


def test_a_container_that_was_given_no_gpu_has_none_whatever_its_host_has(root: Path) -> None:
    for device in (root / "dev").glob("nvidia?"):
        device.unlink()
    assert ask_driver(root) is None
    assert why_torch_misses_a_gpu(root) == ""


def test_a_driver_too_old_for_the_wheels_is_named_with_what_fits_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver 570.86.15 shows 2 GPUs" in why_torch_misses_a_gpu(root)
    assert "CUDA 13.0, which needs driver 580 or newer" in why_torch_misses_a_gpu(root)


def test_wheels_without_cuda_are_told_from_a_driver_that_does_not_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "installed without CUDA" in why_torch_misses_a_gpu(root)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "Mend the driver" in why_torch_misses_a_gpu(root)


def test_a_program_that_fails_is_no_witness(root: Path) -> None:
    program = root / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not talk to the driver'\nexit 9\n")
    program.chmod(0o755)
    assert ask_driver(root) == DriverReport(("2 GPUs",), "570.86.15")
