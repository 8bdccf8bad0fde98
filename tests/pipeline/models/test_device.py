from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import student
from pipeline.batches.join import TrainingBatch
from pipeline.commands.train_student import StudentLearner
from pipeline.errors import UsageError
from pipeline.models.device import choose_device, fastest_precision
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
    assert choose_device("auto") == torch.device(expected)


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
