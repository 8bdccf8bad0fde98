"""What is counted as a launch, without a GPU."""

import torch
from torch import nn

from benchmarks.launches import count_calls

CPU = torch.device("cpu")


def launches(act) -> int:
    act()  # what is done but once is done then
    return count_calls(act, CPU)["launches"]


def test_what_computes_is_counted_and_other_views_of_memory_are_not() -> None:
    image, layer = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    assert launches(lambda: image.permute(0, 2, 3, 1)[:, 1:].reshape(2, -1)[:0]) == 1, "a copy of what is permuted"
    assert launches(lambda: image.view(2, -1).unsqueeze(1).expand(2, 5, -1)) == 0
    assert launches(lambda: image + 1) == 1
    with torch.no_grad():
        assert launches(lambda: layer(image).relu()) == 2


def test_all_tensors_of_a_list_are_taken_at_once() -> None:
    some = [torch.zeros(3) for _ in range(5)]
    assert launches(lambda: torch._foreach_add_(some, 1.0)) == 1
    assert launches(lambda: [one.add_(1.0) for one in some]) == 5
