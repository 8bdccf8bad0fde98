"""Compiled networks: batches of one shape whatever could be decoded, one graph, and the uncompiled gradients."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import student
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.errors import UsageError
from pipeline.training import loop
from pipeline.training.compiled_network import compile_network, deviation, pays_to_compile
from pipeline.training.global_batch import WeightedBatchNorm, convert_batch_norm, convert_dropout
from pipeline.training.loop import Trainer
from pipeline.training.student_learner import StudentLearner
from student.dynamic_layers import Context, DynamicConv

CLIPS, CLASSES = 6, 5
CPU = torch.device("cpu")
UNDECODABLE: tuple[tuple[int, ...], ...] = ((), (2,), (), (0, 5), (1, 2, 3, 4, 5))
"""Positions of the clips of each step that could not be decoded."""


def batch_of_noise(seed: int, undecodable: tuple[int, ...] = ()) -> TrainingBatch:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.ones(CLIPS, dtype=torch.bool)
    valid[list(undecodable)] = False
    waveforms = 0.1 * torch.randn(CLIPS, 8_000, generator=draw)
    waveforms[~valid] = 0
    return TrainingBatch(
        rows=torch.arange(CLIPS),
        waveforms=waveforms,
        labels=(torch.rand(CLIPS, CLASSES, generator=draw) < 0.3).double(),
        teacher_logits=torch.randn(CLIPS, CLASSES, generator=draw, dtype=torch.float64),
        has_teacher=torch.arange(CLIPS) != 4,
        valid=valid,
        positions=torch.arange(CLIPS),
        global_batch_size=CLIPS,
    )


def batches() -> list[TrainingBatch]:
    return [batch_of_noise(step, undecodable) for step, undecodable in enumerate(UNDECODABLE)]


def trainer_of(compiled: bool | None, *, dtype: torch.dtype = torch.float32) -> Trainer:
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=CLASSES, n_mels=40, hopsize=640).to(dtype)
    model.input_seconds = 0.25  # pyright: ignore[reportAttributeAccessIssue]
    model.front_end.register_forward_hook(lambda layer, given, images: images.to(dtype))
    config = TrainStudentConfig(
        data="", run="", batch_size=CLIPS, compile=compiled, distill=student.DistillConfig(without_logits="share")
    )
    learner = StudentLearner(model, config.distill, config.mixup, student.AugmentConfig(mask_mels=10))  # pyright: ignore[reportArgumentType]
    sampler = EpochSampler(weights=np.ones(2 * CLIPS), batch_size=CLIPS, seed=0)
    return Trainer(learner, config, sampler, lambda epoch: 1.0, CPU)


def uncompiled(network: nn.Module | Callable, **options: object) -> nn.Module | Callable:
    """Stands for torch.compile where what matters is what is compiled."""
    return network


def test_clips_that_only_keep_the_shape_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    dropping, keeping = trainer_of(False, dtype=torch.float64), trainer_of(True, dtype=torch.float64)
    assert len(keeping._norms) == 43
    for ours, theirs in zip(keeping.steps(batches()), dropping.steps(batches()), strict=True):
        assert (ours.loss, ours.gradient_norm) == pytest.approx((theirs.loss, theirs.gradient_norm), rel=1e-12)
        assert ours.clips == theirs.clips
    kept, expected = keeping.state_dict()["model"], dropping.state_dict()["model"]
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_steps_and_evaluations_of_several_epochs_take_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # All that looks at Python, without what makes machine code of it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, plain = trainer_of(True), trainer_of(False)
    torch._dynamo.reset()
    counters.clear()
    compiled.warm_up()
    losses = []
    for step in chain.from_iterable(compiled.steps([batch]) for batch in batches()):
        losses.append(step.loss)
        compiled.trained_model.eval()(torch.randn(3, 1, 40, 13))  # as after an epoch, in another shape
    assert counters["frames"]["total"] == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert losses == pytest.approx([step.loss for step in plain.steps(batches())], rel=1e-5)


def test_a_dynamic_convolution_is_not_compiled_anew_for_each_temperature() -> None:
    layer, nothing = DynamicConv(8, 8, 4), torch.empty(0)
    maps, context = torch.randn(2, 8, 5, 5), Context(torch.randn(2, 4), nothing, nothing)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="eager", dynamic=False)
    for temperature in (30.0, 29.0, 1.58, 1.0):
        layer.temperature = temperature
        assert torch.equal(compiled(maps, context), layer(maps, context))
    assert counters["stats"]["unique_graphs"] == 1


class Small(nn.Module):
    """A convolution, a norm, an activation, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.Hardswish(), nn.Dropout(0.3))
        self.last = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.maps(images).mean(dim=(2, 3)))


def small_network() -> Small:
    network = Small()
    for layer in convert_dropout(network):
        layer.draw_for(1, torch.arange(4), 4)
    for layer in convert_batch_norm(network, WeightedBatchNorm):
        layer.weigh(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    return network


def run(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def test_weighted_norms_and_dropout_have_their_gradient_compiled_too_and_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All of torch.compile but its last step, whose C++ compiler takes minutes on a busy machine.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    network, images = small_network(), torch.randn(4, 1, 16, 20)
    before = copy.deepcopy(network.state_dict())
    compiled = compile_network(network, CPU, keeps_shape=True, at_once=True)
    assert deviation(network, compiled, images, run) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_a_network_that_computes_something_else_is_found_out() -> None:
    network, images = small_network(), torch.randn(4, 1, 16, 20)
    other = copy.deepcopy(network)
    other.maps = nn.Sequential(*list(network.maps)[::2])  # the same weights, without the norm
    other.last = network.last
    assert deviation(network, other, images, run) > 0.3


class Wrong(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features.flip(2))


class Failing(Wrong):
    def forward(self, features: Tensor) -> Tensor:
        raise RuntimeError("ptxas: no such file\nand more")


@pytest.mark.parametrize(("kind", "why"), [(Wrong, "% off"), (Failing, "RuntimeError: ptxas: no such file")])
def test_compiling_by_default_is_given_up_where_it_fails_or_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[nn.Module], why: str
) -> None:
    monkeypatch.setattr(loop, "pays_to_compile", lambda *_, **__: True)
    monkeypatch.setattr(torch, "compile", lambda network, **_: kind(network))
    by_default, plain = trainer_of(None), trainer_of(False)
    with caplog.at_level(logging.WARNING):
        by_default.warm_up()
    assert why in caplog.text
    assert "and more" not in caplog.text
    assert list(by_default.steps(batches())) == list(plain.steps(batches()))


def test_compiling_that_was_asked_for_is_refused_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda network, **_: Wrong(network) if isinstance(network, nn.Module) else network
    )
    with pytest.raises(UsageError, match=r"--compile: .* % off\); leave it out"):
        trainer_of(True).warm_up()


def test_warming_up_changes_nothing() -> None:
    warm, cold = trainer_of(False), trainer_of(False)
    warm.warm_up()
    assert list(warm.steps(batches())) == list(cold.steps(batches()))
    ours, theirs = warm.state_dict()["model"], cold.state_dict()["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_long_runs_on_a_gpu_in_batches_of_one_shape_are_compiled_by_default() -> None:
    gpu = torch.device("cuda")
    assert pays_to_compile(gpu, steps=2_000, keeps_shape=True)
    assert not pays_to_compile(gpu, steps=1_999, keeps_shape=True)
    assert not pays_to_compile(gpu, steps=2_000, keeps_shape=False)
    assert not pays_to_compile(CPU, steps=1_000_000, keeps_shape=True)
