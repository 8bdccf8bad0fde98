"""Whatever command learns from labels, it learns nothing from those that nobody knows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import student
import teacher
from pipeline.batches.join import TrainingBatch
from pipeline.training.finetuning import FinetuneConfig, FinetuneLearner
from pipeline.training.loop import Learner
from pipeline.training.student_learner import StudentLearner
from pipeline.training.teacher_learner import TeacherLearner

CLASSES, CLIPS = 3, 4
UNKNOWN = 2
"""The class whose label nobody knows, in any clip."""


def make_learner(kind: str, mixes: str) -> Learner:
    torch.manual_seed(0)
    mixup, augment = student.MixupConfig(alpha=0.3 if mixes == "mixed" else 0.0), student.AugmentConfig()
    if kind == "train-teacher":
        return TeacherLearner(teacher.create_model("passt_tiny", num_classes=CLASSES), mixup, augment)
    model = student.create_model("mn01", num_classes=CLASSES, n_mels=40, hopsize=1600)
    if kind == "train-student":
        return StudentLearner(model, student.DistillConfig(), mixup, augment)
    return FinetuneLearner(model, "multi-label", FinetuneConfig(data="", run="", model="mn01", mixup=mixup))


def make_batch(learner: Learner) -> TrainingBatch:
    model: Any = learner.model
    seconds = model.input_seconds if isinstance(learner, TeacherLearner) else 1.0
    generator = torch.Generator().manual_seed(1)
    label_mask = torch.ones(CLIPS, CLASSES, dtype=torch.bool)
    label_mask[:, UNKNOWN] = False
    return TrainingBatch(
        rows=torch.arange(CLIPS),
        waveforms=0.1 * torch.randn(CLIPS, round(model.sample_rate_hz * seconds), generator=generator),
        labels=torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]]),
        teacher_logits=torch.zeros(CLIPS, CLASSES),
        has_teacher=torch.zeros(CLIPS, dtype=torch.bool),
        valid=torch.ones(CLIPS, dtype=torch.bool),
        label_mask=label_mask,
        positions=torch.arange(CLIPS),
        global_batch_size=CLIPS,
    )


def loss_and_bias_gradient(learner: Learner, batch: TrainingBatch) -> tuple[float, torch.Tensor]:
    network = learner.model.eval()
    network.zero_grad()
    loss = learner.loss(network, batch, torch.Generator().manual_seed(2))
    loss.backward()
    bias = [one for name, one in network.named_parameters() if name.endswith("bias") and one.shape == (CLASSES,)][-1]
    assert bias.grad is not None
    return loss.item(), bias.grad.clone()


@pytest.mark.parametrize("mixes", ["mixed", "as they are"])
@pytest.mark.parametrize("kind", ["finetune", "train-student", "train-teacher"])
def test_nothing_is_learned_from_a_label_that_nobody_knows(kind: str, mixes: str) -> None:
    learner = make_learner(kind, mixes)
    batch = make_batch(learner)
    loss, gradient = loss_and_bias_gradient(learner, batch)
    assert gradient[UNKNOWN] == 0
    assert (gradient[:UNKNOWN] != 0).all()
    labels = batch.labels.clone()
    labels[:, UNKNOWN] = 1
    other_loss, other_gradient = loss_and_bias_gradient(learner, replace(batch, labels=labels))
    assert other_loss == loss
    assert torch.equal(other_gradient, gradient)


def test_a_student_learns_an_unknown_label_from_its_teacher_alone() -> None:
    learner = make_learner("train-student", "as they are")
    batch = make_batch(learner)
    batch = replace(
        batch, has_teacher=torch.ones(CLIPS, dtype=torch.bool), teacher_logits=torch.full((CLIPS, CLASSES), 3.0)
    )
    labels = batch.labels.clone()
    labels[:, UNKNOWN] = 1
    loss, gradient = loss_and_bias_gradient(learner, batch)
    assert gradient[UNKNOWN] < 0  # towards the teacher's 0.95
    assert loss_and_bias_gradient(learner, replace(batch, labels=labels))[0] == loss
