"""The loss equals upstream's where every clip has a teacher, and is right where upstream's isn't."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.losses import (
    DistillConfig,
    blend_targets,
    clip_bce,
    distillation_loss,
    masked_bce,
    teacher_probabilities,
)
from student.mixup import Mix

CLASSES = 7


def batch(clips: int, seed: int = 0):
    """Student logits, labels and teacher probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(clips, CLASSES, generator=generator)
    labels = (torch.rand(clips, CLASSES, generator=generator) < 0.3).float()
    return logits, labels, torch.rand(clips, CLASSES, generator=generator)


def golden_case(path):
    """Run our loss on a stored case: loss, gradient, upstream's loss, upstream's gradient, the stored arrays."""
    case = np.load(path)
    tensors = {name: torch.from_numpy(np.asarray(case[name])) for name in case.files}
    config = DistillConfig(teacher_weight=1 - float(case["kd_lambda"]), temperature=float(case["temperature"]))
    logits = tensors["student_logits"].requires_grad_()
    loss = distillation_loss(
        logits,
        tensors["labels"],
        teacher_probabilities(tensors["teacher_logits_float16"], config),
        tensors["teacher_index"] >= 0,
        config,
        mix=Mix(tensors["permutation"], tensors["lam"]),
    )
    loss.backward()
    return loss.item(), logits.grad, float(case["total_loss"]), tensors["grad_student_logits"], tensors


def test_value_and_gradient_equal_upstreams_where_every_clip_has_a_teacher(golden_dir) -> None:
    loss, gradient, upstream_loss, upstream_gradient, _ = golden_case(golden_dir / "kd_loss_T2_all_known.npz")
    assert loss == pytest.approx(upstream_loss, rel=1e-6)
    torch.testing.assert_close(gradient, upstream_gradient, atol=1e-9, rtol=1e-5)


def test_gradient_equals_upstreams_exactly_for_the_clips_with_both_teachers(golden_dir) -> None:
    _, gradient, _, upstream_gradient, case = golden_case(golden_dir / "kd_loss_T1.npz")
    known = case["teacher_index"] >= 0
    both = known & known[case["permutation"]]
    assert gradient is not None
    torch.testing.assert_close(gradient[both], upstream_gradient[both], atol=1e-9, rtol=1e-5)
    assert 0 < both.sum() < len(both)
    assert not torch.isclose(gradient[~both], upstream_gradient[~both], atol=1e-9, rtol=1e-5).all(dim=1).any()


def test_clip_without_teacher_learns_from_its_labels_alone_at_full_weight() -> None:
    logits, labels, probs = batch(1)
    loss = distillation_loss(logits, labels, probs, torch.tensor([False]), DistillConfig())
    torch.testing.assert_close(loss, clip_bce(logits, labels).mean())


def test_teacher_weight_one_is_pure_distillation_and_zero_is_labels_only() -> None:
    logits, labels, probs = batch(3)
    has_teacher = torch.ones(3, dtype=torch.bool)
    pure = distillation_loss(logits, labels, probs, has_teacher, DistillConfig(teacher_weight=1.0))
    torch.testing.assert_close(pure, clip_bce(logits, probs).mean())
    labels_only = distillation_loss(logits, labels, probs, has_teacher, DistillConfig(teacher_weight=0.0))
    torch.testing.assert_close(labels_only, clip_bce(logits, labels).mean())


def test_pure_distillation_still_teaches_a_clip_without_teacher_by_its_labels() -> None:
    logits, labels, probs = batch(1)
    loss = distillation_loss(logits, labels, probs, torch.tensor([False]), DistillConfig(teacher_weight=1.0))
    torch.testing.assert_close(loss, clip_bce(logits, labels).mean())


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    weight=st.floats(0, 1),
    known=st.lists(st.booleans(), min_size=4, max_size=4),
    share=st.lists(st.floats(0.5, 1), min_size=4, max_size=4),
)
def test_each_side_of_a_mix_counts_its_teacher_only_where_it_has_one(seed, weight, known, share) -> None:
    logits, labels, probs = batch(4, seed)
    partner = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    config = DistillConfig(teacher_weight=weight)
    loss = distillation_loss(logits, labels, probs, torch.tensor(known), config, mix=Mix(partner, torch.tensor(share)))
    expected = 0.0
    for clip in range(4):
        for side, part in ((clip, share[clip]), (int(partner[clip]), 1 - share[clip])):
            own_weight = weight if known[side] else 0.0
            from_labels = clip_bce(logits[clip : clip + 1], labels[side : side + 1]).item()
            from_teacher = clip_bce(logits[clip : clip + 1], probs[side : side + 1]).item()
            expected += part * ((1 - own_weight) * from_labels + own_weight * from_teacher) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_stands_in_a_missing_teachers_row_does_not_matter() -> None:
    logits, labels, probs = batch(3)
    has_teacher = torch.tensor([True, False, True])
    mix = Mix(torch.tensor([1, 2, 0]), torch.tensor([0.6, 0.7, 0.8]))
    expected = distillation_loss(logits, labels, probs, has_teacher, DistillConfig(), mix=mix)
    for rubbish in (0.0, 1.0, math.nan):
        probs[1] = rubbish
        loss = distillation_loss(logits, labels, probs, has_teacher, DistillConfig(), mix=mix)
        torch.testing.assert_close(loss, expected)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits, labels, _ = batch(2)
    assert clip_bce(logits.bfloat16(), labels).dtype == torch.float32


def test_teacher_temperature_softens_the_probabilities() -> None:
    logits = torch.tensor([[2.0, -4.0]], dtype=torch.float16)
    soft = teacher_probabilities(logits, DistillConfig(temperature=2.0))
    torch.testing.assert_close(soft, torch.tensor([[1.0, -2.0]]).sigmoid())


def test_disagreeing_shapes_are_refused() -> None:
    logits, labels, probs = batch(3)
    has_teacher = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="aren't one"):
        clip_bce(logits, labels[:, :-1])
    with pytest.raises(ValueError, match="has_teacher"):
        blend_targets(labels, probs, has_teacher[:-1], DistillConfig())
    with pytest.raises(ValueError, match="teacher_probs"):
        blend_targets(labels, probs[:, :-1], has_teacher, DistillConfig())


@pytest.mark.parametrize("wrong", [{"teacher_weight": -0.1}, {"teacher_weight": 1.1}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="distill"):
        DistillConfig(**wrong)


def test_judged_cross_entropy_counts_only_what_was_judged_and_mixes_like_the_clips() -> None:
    logits = torch.linspace(-30, 30, 12).view(4, 3)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
    everything, label_mask = torch.ones(4, 3), torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]])
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(masked_bce(logits, labels, everything), clip_bce(logits, labels))
    torch.testing.assert_close(masked_bce(logits, labels * label_mask, label_mask), (each * label_mask).mean(dim=1))
    mix = Mix(torch.tensor([1, 0, 3, 2]), torch.tensor([0.9, 0.6, 1.0, 0.7]))
    partner = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[mix.partner], reduction="none")
    share = mix.lam[:, None]
    expected = (share * each * label_mask + (1 - share) * partner * label_mask[mix.partner]).mean(dim=1)
    torch.testing.assert_close(masked_bce(logits, mix.of(labels * label_mask), mix.of(label_mask)), expected)


@pytest.mark.parametrize("without_logits", ["full", "share"])
def test_label_and_teacher_count_each_where_it_is_known(without_logits) -> None:
    config = DistillConfig(teacher_weight=0.75, without_logits=without_logits)
    logits, labels, probs = batch(4)
    has_teacher = torch.tensor([True, True, False, False])
    label_mask = torch.ones(4, CLASSES, dtype=torch.bool)
    label_mask[[1, 3], 2:] = False
    by_label, by_teacher = (
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        for targets in (labels, probs)
    )
    alone = (1.0, 1.0) if without_logits == "full" else (0.25, 0.75)
    expected = 0.25 * by_label + 0.75 * by_teacher
    expected[1, 2:] = alone[1] * by_teacher[1, 2:]
    expected[2:] = alone[0] * by_label[2:]
    expected[3, 2:] = 0
    loss = distillation_loss(logits, labels, probs, has_teacher, config, label_mask=label_mask)
    torch.testing.assert_close(loss, expected.mean())
    mix = Mix(torch.tensor([1, 0, 3, 2]), torch.tensor([0.9, 0.6, 1.0, 0.7]))
    both = [
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[mix.partner], reduction="none")
        for targets in (labels, probs)
    ]
    partner = 0.25 * both[0] + 0.75 * both[1]  # of the first two clips; clip 0's partner is 1, whose labels lack
    partner[0, 2:] = alone[1] * both[1][0, 2:]
    partner[2:] = alone[0] * both[0][2:]
    partner[2, 2:] = 0
    share = mix.lam[:, None]
    mixed = distillation_loss(logits, labels, probs, has_teacher, config, label_mask=label_mask, mix=mix)
    torch.testing.assert_close(mixed, (share * expected + (1 - share) * partner).mean())


@pytest.mark.parametrize("without_logits", ["full", "share"])
def test_a_mask_of_everything_changes_nothing(without_logits) -> None:
    config = DistillConfig(without_logits=without_logits)
    logits, labels, probs = batch(4)
    has_teacher = torch.tensor([True, False, True, False])
    everything = torch.ones(4, CLASSES, dtype=torch.bool)
    plain = distillation_loss(logits, labels, probs, has_teacher, config)
    torch.testing.assert_close(
        distillation_loss(logits, labels, probs, has_teacher, config, label_mask=everything), plain
    )
