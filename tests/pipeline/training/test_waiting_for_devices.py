"""A step whose numbers nobody waits for: what a GPU is given, counted on a device without values."""

from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import student
from benchmarks.launches import count_calls
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.training.loop import Trainer
from pipeline.training.optimizing import AverageConfig, build_average
from pipeline.training.student_learner import StudentLearner

CLIPS, CLASSES = 4, 5
CPU = torch.device("cpu")


def batch_of_noise(seed: int = 0) -> TrainingBatch:
    draw = torch.Generator().manual_seed(seed)
    return TrainingBatch(
        rows=torch.arange(CLIPS),
        waveforms=0.1 * torch.randn(CLIPS, 16_000, generator=draw),
        labels=(torch.rand(CLIPS, CLASSES, generator=draw) < 0.3).float(),
        teacher_logits=torch.randn(CLIPS, CLASSES, generator=draw),
        has_teacher=torch.ones(CLIPS, dtype=torch.bool),
        valid=torch.ones(CLIPS, dtype=torch.bool),
        positions=torch.arange(CLIPS),
        global_batch_size=CLIPS,
    )


def trainer_on(device: str, *, late: bool) -> Trainer:
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=CLASSES)
    if device == "meta":  # which has no generator
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    config = TrainStudentConfig(data="", run="", batch_size=CLIPS, average=AverageConfig(kind="ema"))
    learner = StudentLearner(model, config.distill, config.mixup, config.augment)
    sampler = EpochSampler(weights=np.ones(CLIPS), batch_size=CLIPS, seed=0)
    trainer = Trainer(learner, config, sampler, lambda epoch: 1.0, torch.device(device))
    trainer._settles_late = late
    return trainer


class Traffic(TorchDispatchMode):
    """Counts the copies to a device without values; what would wait for such a device fails by itself."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        taken = [one.device.type for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        given = [one.device.type for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        if func.name().startswith(("aten::_to_copy", "aten::copy_")) and "cpu" in taken and "meta" in given:
            self.copies += 1
        return made


def test_a_step_copies_its_batch_at_once_and_its_mix_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *_, **__: torch.amp.grad_scaler.GradScaler("cpu", enabled=False)
    )
    trainer = trainer_on("meta", late=True)
    monkeypatch.setattr(trainer._optimizer, "step", lambda: None)  # nor its fused kernel
    batch = batch_of_noise().pack(pin_memory=False)
    with Traffic() as traffic:
        report = next(trainer.steps([batch]))
    assert report.step == 1
    assert traffic.copies == 3, "the batch, and mixup's partners and shares"


def test_the_average_is_that_of_torch_in_a_tenth_of_the_kernels_and_copies_nothing_from_the_host() -> None:
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=CLASSES)
    ours = build_average(model, AverageConfig(kind="ema", decay=0.9))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    assert ours is not None
    for number in range(3):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data += number + 1
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    launches = [count_calls(lambda one=one: one.update_parameters(model), CPU)["launches"] for one in (ours, theirs)]
    assert launches[0] <= launches[1] / 10
    elsewhere = model.to("meta")
    there = build_average(elsewhere, AverageConfig(kind="ema"))
    assert there is not None
    with Traffic() as traffic:
        for _ in range(2):
            there.update_parameters(elsewhere)
    assert not traffic.copies


def test_steps_that_nobody_waits_for_change_the_weights_alike() -> None:
    waited, late = trainer_on("cpu", late=False), trainer_on("cpu", late=True)
    reports = [list(one.steps(map(batch_of_noise, range(3)))) for one in (waited, late)]
    assert reports[0] == reports[1]
    ours, theirs = waited.state_dict(), late.state_dict()
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    assert all(torch.equal(ours["average"][name], theirs["average"][name]) for name in ours["average"])


def test_a_loss_that_is_not_finite_is_told_a_step_later_and_has_changed_no_weight() -> None:
    trainer = trainer_on("cpu", late=True)
    bad = batch_of_noise(1)
    bad.waveforms[0, 0] = torch.nan
    steps = trainer.steps([batch_of_noise(0), bad, batch_of_noise(2), batch_of_noise(3)])
    list(islice(steps, 1))
    before = {name: weight.detach().clone() for name, weight in trainer._model.named_parameters()}
    next(steps)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        next(steps)
    assert trainer.step == 1
    assert all(torch.equal(weight, before[name]) for name, weight in trainer._model.named_parameters())


def test_a_state_is_not_given_away_before_its_last_step_is_known_to_be_sound() -> None:
    trainer = trainer_on("cpu", late=True)
    bad = batch_of_noise()
    bad.waveforms[:] = torch.inf
    next(trainer.steps([bad]))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        trainer.state_dict()
