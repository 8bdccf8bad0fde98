import torch

from pipeline.models.transfer import DeviceCopies, LateNumbers, PackedTensors


def test_packed_tensors_are_the_same_and_go_over_in_one_piece() -> None:
    tensors = {
        "sound": torch.randn(3, 7),
        "valid": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 5),
        "rows": torch.tensor([2**40, -1]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    packed = PackedTensors.of(tensors)
    assert packed.memory.dtype == torch.uint8
    assert all(span.start % 64 == 0 for span in packed.spans.values())
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.untyped_storage().data_ptr() == packed.memory.untyped_storage().data_ptr()
    there = packed.over(DeviceCopies("meta")).tensors()
    assert {name: (one.dtype, one.shape) for name, one in there.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }


def test_copies_to_where_tensors_are_already_are_none() -> None:
    tensor = torch.zeros(3)
    assert DeviceCopies("cpu").copy([tensor])[0] is tensor


def test_late_numbers_are_equal_by_what_they_are() -> None:
    assert LateNumbers(torch.tensor([0.5, 2.0])) == LateNumbers(torch.tensor([0.5, 2.0]))
    assert LateNumbers(torch.tensor([0.5, 2.0])).read() == [0.5, 2.0]
    assert LateNumbers(torch.tensor([0.5])) != LateNumbers(torch.tensor([0.25]))
