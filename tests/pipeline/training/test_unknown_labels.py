"""Clips whose labels nobody knows learn from their logits alone, wherever it is said that nobody knows them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from fixed_logits import FixedLogits
from made_stores import fill_store
from safetensors.torch import load_file
from several_ranks import run_ranks
from torch.nn import functional as F

import student
from pipeline.batches.sampling import build_sampler
from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.errors import UsageError
from pipeline.runtime.progress import read_metrics
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.run import open_clips
from pipeline.training.stored_logits import open_logits
from pipeline.training.student_learner import StudentLearner

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS, CLASSES, SHARE = 16, 4, 0.5
WITHOUT_LOGITS = ("clip14", "clip15")


def keeps_labels(clip_id: str, share: float = SHARE) -> bool:
    """The rule as docs/training.md has it."""
    number = int.from_bytes(blake2b(clip_id.encode(), digest_size=8, person=b"label share").digest(), "big")
    return number < share * 2**64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), clips=CLIPS)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    logits = np.random.default_rng(0).normal(0, 3, (CLIPS, CLASSES)).astype(np.float16)
    fill_store(folder, read_manifest(data), logits, absent=WITHOUT_LOGITS)
    return str(folder)


@pytest.fixture
def config(data: Path, store: str, tmp_path: Path) -> TrainStudentConfig:
    return TrainStudentConfig(
        data=str(data),
        store=store,
        eval_data=str(data),
        run=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        model="mn01",
        model_options={"n_mels": 40, "hopsize": 1600},
        label_share=SHARE,
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
        checkpoint_minutes=0,
        keep_checkpoints=10,
        log_every=1,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_each_clip_learns_from_what_is_known_of_it(config: TrainStudentConfig, alpha: float) -> None:
    manifest = read_manifest(config.data).with_label_share(SHARE)
    logits, _ = open_logits(str(config.store), manifest, config.cache_folder(), consistent_views=True)
    model = student.create_model("mn01", num_classes=CLASSES, n_mels=40, hopsize=1600)
    batch, mixup = open_clips(config, manifest, model, logits)[np.arange(CLIPS)], student.MixupConfig(alpha=alpha)
    opinion = torch.randn(CLIPS, CLASSES, generator=torch.Generator().manual_seed(1))
    learner = StudentLearner(model, student.DistillConfig(teacher_weight=0.8), mixup, student.AugmentConfig())
    loss = learner.loss(FixedLogits(opinion), batch, torch.Generator().manual_seed(3))

    mix = student.draw_mix(student.Randomness.of_batch(CLIPS, torch.Generator().manual_seed(3)), mixup)
    true_labels = torch.eye(CLASSES)[torch.arange(CLIPS) % CLASSES]
    sides = []
    for row in range(CLIPS):
        losses = []
        for side, share in ((row, mix.lam[row]), (int(mix.partner[row]), 1 - mix.lam[row])):
            labels, taught = true_labels[side], batch.teacher_logits[side].sigmoid()
            target = {
                (True, True): 0.2 * labels + 0.8 * taught,
                (True, False): labels,
                (False, True): taught,
                (False, False): None,
            }[keeps_labels(f"clip{side}"), f"clip{side}" not in WITHOUT_LOGITS]
            if target is not None:
                losses.append(share * F.binary_cross_entropy_with_logits(opinion[row], target))
        sides.append(sum(losses))
    assert {keeps_labels(f"clip{row}") for row in range(CLIPS)} == {True, False}
    assert loss.item() == pytest.approx(float(sum(sides) / CLIPS), rel=1e-6)


def test_shares_lie_in_one_another_and_what_keeps_its_labels_keeps_all_of_them(data: Path) -> None:
    manifest, rows = read_manifest(data), np.arange(CLIPS)
    whole = manifest.label_matrix(rows)
    before = np.zeros(CLIPS, bool)
    for share in (0.0, 0.1, 0.25, 0.5, 0.9):
        shared = manifest.with_label_share(share)
        known = np.array([keeps_labels(f"clip{row}", share) for row in rows])
        np.testing.assert_array_equal(shared.unlabelled, ~known)
        np.testing.assert_array_equal(shared.label_matrix(rows), whole * known[:, None])
        mask = shared.label_mask(rows)
        assert mask is not None
        np.testing.assert_array_equal(mask, np.repeat(known[:, None], CLASSES, axis=1))
        assert not (before & ~known).any()
        assert shared.identity != manifest.identity
        before = known
    assert manifest.with_label_share(1.0).identity == manifest.identity
    assert not manifest.unlabelled.any()


@pytest.mark.parametrize("sampling", ["balanced", "uniform", "stream"])
def test_a_clip_is_drawn_where_something_can_be_learned_from_it(data: Path, sampling: str) -> None:
    manifest = read_manifest(data).with_label_share(SHARE)
    has_logits = np.array([f"clip{row}" not in WITHOUT_LOGITS for row in range(CLIPS)])
    known = ~manifest.unlabelled

    def drawn(logits: np.ndarray | None) -> set[int]:
        sampler = build_sampler(manifest, has_logits=logits, sampling=sampling, batch_size=1)  # pyright: ignore[reportArgumentType]
        return {int(row) for batch in sampler.batches(0, sampler.steps_per_epoch) for row in batch}

    assert drawn(has_logits) == set(np.flatnonzero(known | has_logits).tolist())
    assert drawn(None) == set(np.flatnonzero(known).tolist())


def test_a_run_with_few_labels_resumes_to_the_same_bits_and_is_judged_by_all_labels(
    config: TrainStudentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert run(config).finished
    unknown = [row for row in range(CLIPS) if not keeps_labels(f"clip{row}")]
    neither = [row for row in unknown if f"clip{row}" in WITHOUT_LOGITS]
    assert (
        f"{len(unknown) - len(neither)} of {CLIPS} clips have no known labels: they learn from the log" in caplog.text
    )
    straight = load_file(tmp_path / "run" / "last.safetensors")
    for path in list_checkpoints(tmp_path / "run")[1:]:
        path.unlink()
    with pytest.raises(UsageError, match=r"label_share: 0\.5 → 1\.0"):
        run(replace(config, resume=True, label_share=1.0))
    assert run(replace(config, resume=True)).finished
    again = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in straight.items())
    assert [line["eval/clips"] for line in read_metrics(tmp_path / "run") if "eval/clips" in line] == [CLIPS] * 2


def test_two_ranks_learn_from_few_labels_as_one_does(config: TrainStudentConfig, tmp_path: Path) -> None:
    config = replace(config, epochs=1, eval_data=None)
    run(config)
    outcomes = run_ranks(2, run, replace(config, run=str(tmp_path / "two")))
    assert [outcome.finished for outcome in outcomes] == [True, True]
    losses = [
        [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]
        for folder in (tmp_path / "run", tmp_path / "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_without_any_label_a_student_learns_from_logits_and_without_a_store_there_is_nothing_to_learn(
    config: TrainStudentConfig, tmp_path: Path
) -> None:
    assert run(replace(config, label_share=0.0, epochs=1)).finished
    with pytest.raises(UsageError, match="those whose labels are unknown need logits"):
        run(replace(config, label_share=0.0, store=None, run=str(tmp_path / "other")))
    with pytest.raises(UsageError, match=r"label_share is 1\.5"):
        replace(config, label_share=1.5)


def test_the_manifest_itself_may_say_that_nobody_knows_a_clip_s_labels(data: Path) -> None:
    manifest = read_manifest(data)
    rows = manifest.table.to_pylist()
    for row in rows[:3]:
        row |= {"labels": [], "label_mask": []}
    rows[3]["labels"] = []  # nothing is to be heard there
    made = Manifest(
        manifest.location, type(manifest.table).from_pylist(rows, manifest.table.schema), manifest.vocabulary
    )
    assert made.unlabelled.tolist() == [True] * 3 + [False] * (CLIPS - 3)
    assert made.known_counts().tolist() == [CLIPS - 3] * CLASSES
