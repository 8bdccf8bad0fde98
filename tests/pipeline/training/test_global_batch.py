"""Layers over a global batch that several processes share: what one process with all of it computes, and no waits."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from several_ranks import run_ranks
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.training.global_batch import GlobalBatchDropout, GlobalBatchNorm, convert_batch_norm, convert_dropout

SHARES = (slice(0, 2), slice(2, 7))
LAYOUTS = {
    "rows": ((7, 6), torch.contiguous_format),
    "images": ((7, 6, 5, 4), torch.contiguous_format),
    "channels last": ((7, 6, 5, 4), torch.channels_last),
}


def sample(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps whose mean is far from zero, and what their results weigh in the loss."""
    shape, memory = LAYOUTS[layout]
    draw = torch.Generator().manual_seed(0)
    maps, weights = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return (30 + maps).to(dtype).contiguous(memory_format=memory), weights.to(dtype)


def norm_of(layout: str, *, affine: bool = True) -> nn.Module:
    kind = nn.BatchNorm1d if layout == "rows" else nn.BatchNorm2d
    layer = kind(6, eps=1e-3, momentum=0.1, affine=affine).double()
    with torch.no_grad():
        for number, weight in enumerate(layer.parameters()):
            weight.copy_(torch.linspace(0.5, 2 + number, 6))
    return layer


def learn(layer: nn.Module, maps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    maps = maps.detach().requires_grad_()
    out = layer(maps)
    (out * weights).sum().backward()
    assert maps.grad is not None
    found = {"out": out.detach(), "maps": maps.grad}
    gradients = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    found |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return found | dict(layer.named_buffers())


def learn_as_a_rank(layout: str, affine: bool) -> dict[str, np.ndarray]:
    dist.init_process_group("gloo")
    try:
        layer, (maps, weights) = norm_of(layout, affine=affine), sample(layout)
        convert_batch_norm(layer, GlobalBatchNorm)
        assert isinstance(layer, GlobalBatchNorm)
        mine = SHARES[dist.get_rank()]
        return {name: found.numpy() for name, found in learn(layer, maps[mine], weights[mine]).items()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_of_two_ranks_is_that_of_one_with_all_clips(layout: str, affine: bool) -> None:
    alone = learn(norm_of(layout, affine=affine), *sample(layout))
    ranks = run_ranks(2, learn_as_a_rank, layout, affine)
    for name, expected in alone.items():
        parts = [torch.from_numpy(found[name]) for found in ranks]
        if name in ("out", "maps"):
            found = torch.cat(parts)
        else:
            found = sum(parts) if name.startswith("gradient") else parts[0]
            assert name.startswith("gradient") or torch.equal(*parts), f"{name} differs between the ranks"
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_over_ranks_waits_for_nothing_and_exchanges_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values whatever waits for one fails by itself."""
    exchanged: list[tuple[int, ...]] = []
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        monkeypatch.setattr(dist, "all_reduce", lambda values: exchanged.append(tuple(values.shape)))
        layer = norm_of("channels last").to("meta")
        convert_batch_norm(layer, GlobalBatchNorm)
        maps, weights = (one.to("meta") for one in sample("channels last"))
        found = learn(layer, maps, weights)
    finally:
        dist.destroy_process_group()
    assert exchanged == [(4, 13), (2, 6)]
    assert found["out"].is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_in_bfloat16_keeps_its_statistics_in_float32() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        exact, layer = norm_of("channels last"), norm_of("channels last").float()
        convert_batch_norm(layer, GlobalBatchNorm)
        maps, weights = sample("channels last", torch.bfloat16)
        expected = learn(exact, maps.double(), weights.double())
        found = learn(layer, maps, weights)
    finally:
        dist.destroy_process_group()
    assert found["out"].dtype == found["maps"].dtype == torch.bfloat16
    for name in ("running_mean", "running_var"):  # of maps near 30, a step of bfloat16 is 0.125
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["out"].double(), expected["out"], rtol=0.01, atol=0.01)


def dropout_of(share: float) -> GlobalBatchDropout:
    layer = nn.Dropout(share)
    convert_dropout(layer)
    assert isinstance(layer, GlobalBatchDropout)
    return layer


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_drops_its_share_everywhere_and_keeps_the_mean(share: float) -> None:
    layer, ones = dropout_of(share), torch.ones(200, 500)
    layer.draw_for(7, torch.arange(200), 200)
    kept = layer(ones)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    kept = (kept > 0).double()
    assert kept.mean() == pytest.approx(1 - share, abs=0.005)  # 3.2 standard deviations of 100,000 draws, or more
    for axis, count in ((0, 200), (1, 500)):
        spread = kept.mean(dim=axis).var().item() * count
        assert spread == pytest.approx(share * (1 - share), rel=0.25), "neither rows nor columns go together"


def test_dropout_follows_the_seed_and_a_clips_position_alone() -> None:
    layer, ones = dropout_of(0.5), torch.ones(6, 3, 11)
    layer.draw_for(3, torch.arange(6), 6)
    whole = layer(ones)
    layer.draw_for(3, torch.tensor([4, 1]), 6)
    assert torch.equal(layer(ones[:2]), whole[[4, 1]])
    layer.draw_for(4, torch.arange(6), 6)
    assert not torch.equal(layer(ones), whole)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(layer.eval()(ones), ones)
