from collections.abc import Callable

import numpy as np
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.scoring.intervals import BootstrapConfig
from pipeline.scoring.scoring import System, score
from pipeline.scoring.tagging_metrics import ranking_scores
from pipeline.training.finetuning import FinetuneConfig, FinetuneLearner

LABELS = np.repeat(np.eye(3), 4, axis=0)  # (12 clips, 3 classes), one class a clip


@pytest.fixture
def logits() -> np.ndarray:
    return (LABELS + np.random.default_rng(3).normal(0, 1, LABELS.shape)).astype(np.float32)


@pytest.fixture
def shifted(logits: np.ndarray) -> np.ndarray:
    """The same softmax of every clip, from logits that are all shifted alike."""
    return logits + np.linspace(-20, 20, 12, dtype=np.float32)[::-1, None]


def test_scores_of_competing_classes_do_not_depend_on_what_all_logits_of_a_clip_share(
    logits: np.ndarray, shifted: np.ndarray
) -> None:
    one, other = (ranking_scores(some, "single-label") for some in (logits, shifted))
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(np.exp(one).sum(axis=1), 1, rtol=1e-5)
    assert ranking_scores(shifted, "multi-label") is shifted


def test_a_single_label_student_in_training_is_judged_by_its_probabilities(
    logits: np.ndarray, shifted: np.ndarray
) -> None:
    learner = FinetuneLearner(None, "single-label", FinetuneConfig(data="", run=""))  # pyright: ignore[reportArgumentType]
    metrics = learner.score(logits, LABELS)
    assert learner.score(shifted, LABELS) == pytest.approx(metrics)
    assert metrics["mAP"] > 0.5


def test_a_single_label_checkpoint_is_scored_by_its_probabilities(
    build_dataset: Callable[..., Manifest], logits: np.ndarray, shifted: np.ndarray
) -> None:
    vocabulary = Vocabulary(tuple(LabelClass(index, f"/m/{index}", f"Sound {index}") for index in range(3)))
    clips = [(f"clip{row:02}", (int(LABELS[row].argmax()),), b"never decoded") for row in range(12)]
    manifest = build_dataset("data", clips, vocabulary=vocabulary)

    def judged(said: np.ndarray, task: str) -> float:
        system = System(name="x", source="x", logits=said, failures={}, task=task)  # pyright: ignore[reportArgumentType]
        report = score([system], manifest, max_failed=0, resampling=BootstrapConfig(bootstrap=0))
        return report.systems[0].mean_average_precision

    assert judged(shifted, "single-label") == pytest.approx(judged(logits, "single-label"))
    assert judged(shifted, "multi-label") < judged(logits, "multi-label")
