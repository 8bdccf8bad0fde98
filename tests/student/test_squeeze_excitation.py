"""Squeeze-excitation gates the axis that it names; several gates are combined place by place."""

import pytest
import torch

from student.layers import global_average_pool
from student.squeeze_excitation import ConcurrentSqueezeExcitation, SqueezeExcitation


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_gate_is_constant_across_the_other_axes(axis) -> None:
    maps = torch.rand(2, 16, 24, 32) + 0.1
    layer = SqueezeExcitation(maps.shape[axis], axis, reduction=4)
    gates = (layer(maps) / maps).movedim(axis, 1).flatten(2)  # (batch, size, all other places)
    torch.testing.assert_close(gates, gates[..., :1].expand_as(gates))
    means = maps.movedim(axis, -1).flatten(1, 2).mean(dim=1)
    expected = layer.fc2(layer.fc1(means).relu()).sigmoid()
    torch.testing.assert_close(gates[..., 0], expected)


@pytest.mark.parametrize(
    ("aggregation", "combine"),
    [
        ("max", lambda parts: torch.maximum(torch.maximum(parts[0], parts[1]), parts[2])),
        ("min", lambda parts: torch.minimum(torch.minimum(parts[0], parts[1]), parts[2])),
        ("add", sum),
        ("avg", lambda parts: sum(parts) / 3),
    ],
)
def test_several_gates_are_combined_as_their_setting_says(aggregation, combine) -> None:
    maps = torch.randn(2, 16, 24, 32)
    layer = ConcurrentSqueezeExcitation((16, 24, 32), "ctf", aggregation, 4)
    parts = [gate(maps) for gate in layer.conc_se_layers]
    assert [gate.axis for gate in layer.conc_se_layers] == [1, 3, 2]
    torch.testing.assert_close(layer(maps), combine(parts))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_the_mean_keeps_the_layout_of_the_maps(layout) -> None:
    maps = torch.randn(2, 16, 24, 32).contiguous(memory_format=layout).requires_grad_()
    means = global_average_pool(maps)
    torch.testing.assert_close(means, maps.mean(dim=(2, 3)))
    weights = torch.randn(2, 16)
    gradient = torch.autograd.grad(means, maps, weights)[0]
    assert gradient.is_contiguous(memory_format=layout)
    torch.testing.assert_close(gradient, (weights / (24 * 32))[:, :, None, None].expand_as(maps))
