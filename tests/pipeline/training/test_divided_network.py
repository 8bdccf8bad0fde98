"""Networks with weights that nothing uses train on several ranks, as all others do."""

import numpy as np
import pytest
import torch
from several_ranks import run_ranks

import student
from pipeline.batches.join import TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.training.divided_network import unused_weights
from pipeline.training.loop import Trainer
from pipeline.training.ranks import Ranks, process_group
from pipeline.training.student_learner import StudentLearner

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS, CLASSES, STEPS = 6, 3, 2
SMALL = {"width_mult": 0.1, "n_mels": 40, "hopsize": 640}
VARIANTS = {
    "whole": {},
    "without attention": {"no_ca": True},
    "without dynamic convolutions": {"no_dyconv": True},
    "without dynamic ReLUs": {"no_dyrelu": True},
    "with nothing dynamic": {"no_ca": True, "no_dyconv": True, "no_dyrelu": True},
    "in some blocks": {"use_dy_blocks": "replace_se", "no_ca": True},
    "with another head": {"head_type": "multihead_attention_pooling", "dyrelu_k": 3, "dyconv_k": 2},
}


def build(variant: str) -> student.DyMN:
    torch.manual_seed(0)
    model = student.DyMN(CLASSES, **SMALL, **VARIANTS[variant])
    model.input_seconds = 0.25
    return model


def batch_of_noise(seed: int) -> TrainingBatch:
    draw = torch.Generator().manual_seed(seed)
    return TrainingBatch(
        rows=torch.arange(CLIPS),
        waveforms=0.1 * torch.randn(CLIPS, 8_000, generator=draw),
        labels=(torch.rand(CLIPS, CLASSES, generator=draw) < 0.4).float(),
        teacher_logits=torch.randn(CLIPS, CLASSES, generator=draw),
        has_teacher=torch.ones(CLIPS, dtype=torch.bool),
        valid=torch.ones(CLIPS, dtype=torch.bool),
        positions=torch.arange(CLIPS),
        global_batch_size=CLIPS,
    )


def learn(variant: str, ranks: Ranks) -> list[tuple[float, float]]:
    """Returns loss and gradient norm of each step."""
    config = TrainStudentConfig(data="", run="", batch_size=CLIPS)
    learner = StudentLearner(build(variant), config.distill, config.mixup, config.augment)
    sampler = EpochSampler(weights=np.ones(CLIPS), batch_size=CLIPS, seed=0)
    trainer = Trainer(learner, config, sampler, lambda epoch: 1.0, torch.device("cpu"), ranks)
    batches = [batch_of_noise(step).only(trainer.positions) for step in range(STEPS)]
    return [(report.loss, report.gradient_norm) for report in trainer.steps(batches)]


def learn_all_as_a_rank() -> dict[str, list[tuple[float, float]]]:
    with process_group(60, "cpu") as ranks:
        return {variant: learn(variant, ranks) for variant in VARIANTS}


def test_each_variant_of_dymn_learns_on_two_ranks_as_on_one() -> None:
    one, other = run_ranks(2, learn_all_as_a_rank)
    assert one == other
    for variant in VARIANTS:
        np.testing.assert_allclose(one[variant], learn(variant, Ranks()), rtol=2e-4, err_msg=variant)


def test_weights_are_unused_where_no_logit_depends_on_them() -> None:
    assert unused_weights(build("whole")) == []
    unused = unused_weights(build("without attention"))
    assert len(unused) == 60
    assert {name.split(".")[3] for name in unused} == {"conv_f", "conv_t"}
    model = build("with nothing dynamic")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(unused_weights(model)) == {name for name, _ in model.named_parameters() if ".context_gen." in name}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
