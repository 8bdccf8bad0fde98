import pytest
import torch

from pipeline.errors import UsageError
from pipeline.models.device import choose_device, fastest_precision


def test_a_device_that_is_not_there_is_wrong_usage() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device gramophone"):
        choose_device("gramophone")


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
