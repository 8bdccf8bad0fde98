from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import PipelineError
from pipeline.scoring.thresholds import best_thresholds, read_thresholds, write_thresholds


def f1_at(threshold: float, probabilities: np.ndarray, labels: np.ndarray) -> float:
    told = probabilities >= threshold
    return 2 * (told & labels).sum() / (told.sum() + labels.sum())


def test_no_other_threshold_gives_a_class_a_higher_f1() -> None:
    random = np.random.default_rng(0)
    probabilities = random.random((40, 6)).round(1)  # with equal ones
    labels = random.random((40, 6)) < [0.5, 0.2, 0.05, 0.9, 0.0, 1.0]
    found = best_thresholds(probabilities, labels)
    for index in (0, 1, 2, 3, 5):
        best = max(f1_at(one, probabilities[:, index], labels[:, index]) for one in np.linspace(0, 1, 201))
        assert found.f1[index] == pytest.approx(best)
        assert f1_at(found.thresholds[index], probabilities[:, index], labels[:, index]) == pytest.approx(best)
    assert np.isnan(found.thresholds[4])


def test_clips_whose_label_is_unknown_do_not_count() -> None:
    probabilities, labels = np.array([[0.9], [0.8], [0.1]]), np.array([[False], [True], [False]])
    mask = np.array([[False], [True], [True]])
    assert best_thresholds(probabilities, labels, mask).f1[0] == 1
    assert best_thresholds(probabilities, labels).f1[0] < 1


def test_what_is_written_is_read_again(tmp_path: Path, five_classes: Vocabulary) -> None:
    labels = np.eye(5, dtype=bool)
    labels[4, 4] = False
    found = best_thresholds(np.eye(5) * 0.5 + 0.1, labels)
    write_thresholds(tmp_path / "thresholds.csv", found, five_classes)
    read = read_thresholds(tmp_path / "thresholds.csv", five_classes)
    np.testing.assert_allclose(read, found.thresholds, rtol=1e-5)
    assert np.isnan(read[4])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("mid,threshold\n/m/9,0.5\n", r"t\.csv:2: the model has no class"),
        ("mid,threshold\n/m/1,1.5\n", r"t\.csv:2: the threshold is '1.5'"),
        ("mid,threshold\n/m/1\n", "not a CSV file of thresholds"),
        ("name,value\n/m/1,0.5\n", "no column mid and no threshold"),
        ("", "no column mid"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(
    tmp_path: Path, five_classes: Vocabulary, content: str, why: str
) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(PipelineError, match=why):
        read_thresholds(tmp_path / "t.csv", five_classes)
