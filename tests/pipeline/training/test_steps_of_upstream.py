"""Our training loop takes the very steps of EfficientAT's `ex_audioset.py` (a425fdc), re-told here from reading it."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import student
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.training.loop import Trainer, TrainingConfig
from pipeline.training.optimizing import OptimizerConfig
from pipeline.training.student_learner import StudentLearner

CLIPS, CLASSES, STEPS, STEPS_PER_EPOCH = 8, 5, 20, 5
SCHEDULE = student.ScheduleConfig(warmup_epochs=2, ramp_down_start_epoch=2, ramp_down_epochs=3)
PEAK = 8e-4


@dataclass(frozen=True)
class Step:
    """What one step was given: the same for both."""

    images: Tensor
    partner: Tensor
    lam: Tensor
    labels: Tensor
    teacher_logits: Tensor
    known: Tensor


def upstreams_curve(epoch: int, *, warm_up: int, down_from: int, down: int, last: float) -> float:
    """An exponential rise, a plateau, a straight line down, a low end."""
    rise = math.exp(-5 * (1 - max(epoch, 0.5) / warm_up) ** 2) if epoch < warm_up else 1.0
    if epoch <= down_from:
        return rise
    return rise * (last + (1 - last) * (down - (epoch - down_from)) / down if epoch - down_from < down else last)


def take_upstreams_steps(network: nn.Module, steps: list[Step], *, kd_lambda: float, temperature: float) -> None:
    """Train as the script does: losses by themselves, weighed and added; Adam; the rate set after each epoch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=PEAK, weight_decay=0.0)
    curve = partial(upstreams_curve, warm_up=2, down_from=2, down=3, last=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
    network.train()
    for number, step in enumerate(steps, start=1):
        lam, others = step.lam.double(), step.partner
        images = step.images * lam.view(-1, 1, 1, 1) + step.images[others] * (1 - lam).view(-1, 1, 1, 1)
        logits = network(images)
        labels = step.labels * lam[:, None] + step.labels[others] * (1 - lam)[:, None]
        label_loss = F.binary_cross_entropy_with_logits(logits, labels)
        soft = (step.teacher_logits / temperature).sigmoid()
        own = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(dim=1)
        its = F.binary_cross_entropy_with_logits(logits, soft[others], reduction="none").mean(dim=1)
        soft_loss = own * lam + its * (1 - lam)
        soft_loss[~step.known] = 0
        loss = kd_lambda * label_loss + (1 - kd_lambda) * soft_loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % STEPS_PER_EPOCH == 0:
            scheduler.step()


def batches(known: Tensor) -> Iterator[TrainingBatch]:
    """Noise of half a second, with labels and logits in double precision."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        labels = (torch.rand(CLIPS, CLASSES, generator=generator) < 0.3).double()
        yield TrainingBatch(
            rows=torch.arange(CLIPS),
            waveforms=0.2 * torch.randn(CLIPS, 16_000, generator=generator),
            labels=labels,
            teacher_logits=torch.where(
                known[:, None], 4 * labels - 2 + torch.randn(CLIPS, CLASSES, generator=generator), 0
            ),
            has_teacher=known,
            valid=torch.ones(CLIPS, dtype=torch.bool),
            positions=torch.arange(CLIPS),
            global_batch_size=CLIPS,
        )


class InDouble(nn.Module):
    """A front end whose images are in double precision, and kept."""

    def __init__(self, front_end: nn.Module) -> None:
        super().__init__()
        self.front_end = front_end
        self.images: list[Tensor] = []

    def forward(self, *given: object) -> Tensor:
        self.images.append(self.front_end(*given).double())
        return self.images[-1]


@pytest.fixture
def network() -> student.Tagger:
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=CLASSES, dropout=0.0, n_mels=40, hopsize=640).double()
    model.front_end = InDouble(model.front_end)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def take_our_steps(
    model: student.Tagger,
    known: Tensor,
    distill: student.DistillConfig,
    mixup: student.MixupConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Step]:
    """Train `model`; give what its steps were given."""
    mixes: list[student.Mix] = []
    draw = student.draw_mix
    monkeypatch.setattr(student, "draw_mix", lambda *given: mixes.append(draw(*given)) or mixes[-1])
    config = TrainingConfig(
        data="unused",
        run="unused",
        batch_size=CLIPS,
        learning_rate=PEAK,
        optimizer=OptimizerConfig(reference_batch=CLIPS),
    )
    trainer = Trainer(
        StudentLearner(model, distill, mixup, student.AugmentConfig()),
        config,
        EpochSampler(weights=np.ones(CLIPS * STEPS_PER_EPOCH), batch_size=CLIPS),
        partial(student.learning_rate_multiplier, config=SCHEDULE),
        torch.device("cpu"),
    )
    given = list(batches(known))
    reports = list(trainer.steps(given))
    assert len({report.learning_rate for report in reports}) == 4, "the schedule moves"
    images: list[Tensor] = model.front_end.images  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return [
        Step(image, mix.partner, mix.lam, batch.labels, batch.teacher_logits, batch.has_teacher)
        for image, mix, batch in zip(images, mixes, given, strict=True)
    ]


def assert_same_weights(ours: nn.Module, theirs: nn.Module, start: nn.Module) -> None:
    for (name, value), other, before in zip(
        ours.state_dict().items(), theirs.state_dict().values(), start.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        assert name.endswith("num_batches_tracked") or not torch.equal(value, before), f"{name} never moved"


@pytest.mark.parametrize(("teacher_weight", "temperature"), [(0.9, 1.0), (0.5, 2.0)])
def test_twenty_steps_with_mixup_are_those_of_upstream(
    network: student.Tagger, monkeypatch: pytest.MonkeyPatch, teacher_weight: float, temperature: float
) -> None:
    start, theirs = copy.deepcopy(network), copy.deepcopy(network)
    distill = student.DistillConfig(teacher_weight=teacher_weight, temperature=temperature)
    known = torch.ones(CLIPS, dtype=torch.bool)
    steps = take_our_steps(network, known, distill, student.MixupConfig(), monkeypatch)
    assert len(steps) == STEPS
    assert all((step.lam < 1).any() for step in steps)
    take_upstreams_steps(theirs, steps, kd_lambda=1 - teacher_weight, temperature=temperature)
    assert_same_weights(network, theirs, start)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_clips_without_logits_weigh_a_tenth_where_upstreams_way_is_asked_for(
    network: student.Tagger, monkeypatch: pytest.MonkeyPatch, alpha: float
) -> None:
    start, theirs, full = (copy.deepcopy(network) for _ in range(3))
    # Upstream gives a clip whose partner has no logits those of the table's last row: so both of a pair have none.
    known = torch.tensor([True, True, False, False, True, True, True, True])
    mixup, distill = student.MixupConfig(alpha=alpha), student.DistillConfig(without_logits="share")
    steps = take_our_steps(network, known, distill, mixup, monkeypatch)
    take_upstreams_steps(theirs, steps, kd_lambda=1 - distill.teacher_weight, temperature=1.0)
    assert_same_weights(network, theirs, start)
    take_our_steps(full, known, replace(distill, without_logits="full"), mixup, monkeypatch)
    assert not torch.allclose(
        full.state_dict()["classifier.5.bias"], theirs.state_dict()["classifier.5.bias"], atol=1e-6
    )
