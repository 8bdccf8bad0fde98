import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import student
from pipeline.batches.join import TrainingBatch
from pipeline.commands.train_student import StudentLearner
from pipeline.errors import UsageError
from pipeline.models.device import choose_device, common_precision, compute_in, fastest_precision, still_works
from student import front_end


def test_a_device_that_is_not_there_is_wrong_usage() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device gramophone"):
        choose_device("gramophone")


@pytest.mark.parametrize(
    ("there", "expected"),
    [({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")],
    ids=["nvidia", "apple", "none"],
)
def test_auto_takes_a_gpu_of_any_maker(there: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == torch.device(expected)


@pytest.fixture
def unusable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows a GPU, and a torch that sees none."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Tesla V100-SXM2-16GB, 535.183.01'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("unusable_gpu")
def test_auto_does_not_pass_over_a_gpu_that_torch_cannot_use() -> None:
    with pytest.raises(UsageError, match=r"535\.183\.01 shows Tesla V100.*or go on without it by --device cpu"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("unusable_gpu")
def test_a_gpu_that_is_asked_for_in_vain_is_told_with_its_driver() -> None:
    with pytest.raises(UsageError, match=r"--device cuda: .*driver 535\.183\.01"):
        choose_device("cuda")


@pytest.mark.usefixtures("unusable_gpu")
@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_auto_passes_over_gpus_that_somebody_hid(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto") == torch.device("cpu")


def test_a_numbered_gpu_is_this_threads_own_before_anything_is_put_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(device))
    choose_device("cuda:1")
    assert touched == [torch.device("cuda:1")] * 2


def test_a_device_that_refuses_everything_is_told_from_one_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert still_works("cpu")

    def refuse(*size: int, device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", refuse)
    assert not still_works("cuda")
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.full((size,), 1.0))
    assert still_works("cuda")
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.full((size,), 3.0))
    assert not still_works("cuda"), "it computes something else"


def test_float32_is_float32_in_all_products_and_tf32_leaves_front_ends_alone() -> None:
    seen: list[tuple[object, object]] = []

    class Noting(nn.Module):
        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return sound

    model = Noting()
    model.front_end = Noting()
    try:
        compute_in("float32", [model])
        model(model.front_end(torch.zeros(1)))
        compute_in("tf32", [model])
        model(model.front_end(torch.zeros(1)))
    finally:
        compute_in("float32", [])
    assert seen == [(False, False), (False, False), (False, False), (True, True)]


def test_machines_of_several_kinds_compute_in_what_none_of_them_imitates() -> None:
    assert common_precision(["bfloat16", "bfloat16"]) == "bfloat16"
    assert common_precision(["bfloat16", "float16"]) == "float16"
    assert common_precision(["float32", "bfloat16"]) == "float32"


class NoDouble(TorchDispatchMode):
    """Refuses what Apple's GPUs have not, on the device that computes shapes alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype not in (torch.float64, torch.complex128), func
        return made


@pytest.mark.parametrize("shifts", [None, torch.tensor([[1.0, 0.0], [0.0, 200.0]])], ids=["jitter", "views"])
def test_a_step_needs_no_double_precision_on_a_device_without(
    shifts: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert front_end.finest_dtype("mps") == torch.float32
    monkeypatch.setattr(front_end, "finest_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch, "autocast", lambda **_: nullcontext())  # which knows no such device
    model = student.create_model("mn01", num_classes=5).to("meta").train()
    learner = StudentLearner(model, student.DistillConfig(), student.MixupConfig(), student.AugmentConfig())
    batch = TrainingBatch(
        rows=torch.arange(2),
        waveforms=torch.zeros(2, 32_000),
        labels=torch.zeros(2, 5),
        teacher_logits=torch.zeros(2, 5),
        has_teacher=torch.ones(2, dtype=torch.bool),
        valid=torch.ones(2, dtype=torch.bool),
        positions=torch.arange(2),
        global_batch_size=2,
        edge_shifts_hz=shifts,
    )
    with NoDouble():
        loss = learner.loss(model, batch.to(torch.device("meta")), torch.Generator())
        assert loss.device.type == "meta"
        loss.backward()


@pytest.mark.parametrize(
    ("device", "abilities", "expected"),
    [
        ("cpu", {"avx512_bf16": True}, "bfloat16"),
        ("cpu", {"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ("cpu", {"avx2": True}, "float32"),
        ("cuda", {"bfloat16": True}, "bfloat16"),
        ("cuda:1", {"bfloat16": False}, "float16"),
        ("mps", {}, "float32"),
    ],
)
def test_fastest_precision_is_one_that_the_device_has_instructions_for(
    device: str, abilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: abilities["bfloat16"])
    assert fastest_precision(device) == expected
