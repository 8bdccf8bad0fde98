import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.scoring.pictures import STYLE, TrainingCurves, _draw_classes, _lift_legend, read_curves, training_picture
from pipeline.scoring.report import SystemScores


def system(name: str, average_precision: np.ndarray) -> SystemScores:
    return SystemScores(
        name=name,
        source=name,
        sha256="",
        mean_average_precision=float(np.nanmean(average_precision)),
        mean_roc_auc=0.9,
        d_prime=1.8,
        average_precision=average_precision,
        roc_auc=average_precision,
        class_d_prime=average_precision,
    )


def run(name: str, steps: int) -> TrainingCurves:
    epochs = [step / 10 for step in range(steps)]
    return TrainingCurves(
        name=name,
        loss_steps=epochs,
        losses=[1 / (1 + epoch) for epoch in epochs],
        score_steps=[1, 2],
        scores=[0.1, 0.2],
    )


def draw(path: Path, **changes: Any) -> np.ndarray:
    average_precision = np.linspace(0.1, 0.9, 40)
    settings: dict[str, Any] = {
        "runs": [run("distilled", 200), run("labels only", 3)],
        "students": [system("distilled", average_precision * 0.8), system("labels only", average_precision * 0.5)],
        "teachers": system("teachers", average_precision),
        "class_names": [f"A rather long class name, number {index}" for index in range(40)],
        "positives": np.arange(40),
    }
    training_picture(path, **(settings | changes))
    return matplotlib.image.imread(path)  # (height, width, channels)


def ink(picture: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return int((np.abs(picture[:, :, :3] - wanted).max(axis=2) < 0.002).sum())


def test_the_picture_shows_each_run_in_its_colour_and_the_teachers_behind(tmp_path: Path) -> None:
    picture = draw(tmp_path / "picture.png")
    assert picture.shape[:2] == (1140, 1500)
    for colour in ("#0072b2", "#e69f00", "#c9ccd1"):
        assert ink(picture, colour) > 3000


@pytest.mark.parametrize("students", [1, 2, 5])
def test_the_legend_hides_no_bar(students: int) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.6), layout="constrained")
        axes = figure.add_subplot(2, 1, 2)
        systems = [system(f"number {order}", np.ones(9)) for order in range(students)]
        colours = {one.name: "#0072b2" for one in systems}
        _draw_classes(axes, np.arange(9), list("abcdefghi"), systems, system("teachers", np.ones(9)), colours)
        _lift_legend(figure, axes)
        figure.canvas.draw()
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y0 > max(bar.get_window_extent().y1 for bar in axes.patches)


def test_curves_are_by_step_which_runs_on_few_clips_and_on_many_share(tmp_path: Path) -> None:
    lines = [{"step": 11, "epoch": 0, "epoch/loss": 0.5}, {"step": 22, "epoch": 1, "epoch/loss": 0.4, "eval/mAP": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curves = read_curves(str(tmp_path), "distilled")
    assert (curves.loss_steps, curves.losses) == ([11, 22], [0.5, 0.4])
    assert (curves.score_steps, curves.scores) == ([22], [0.3])


def test_the_legend_tells_the_interval_of_each_system(tmp_path: Path) -> None:
    bare = [system("distilled", np.full(40, 0.5))]
    resampled = [replace(bare[0], replicates=np.linspace(0.4, 0.6, 41))]
    assert (draw(tmp_path / "bare.png", students=bare) != draw(tmp_path / "told.png", students=resampled)).any()


def test_without_teachers_only_the_students_are_drawn(tmp_path: Path) -> None:
    assert ink(draw(tmp_path / "picture.png", teachers=None), "#c9ccd1") < 100


def test_a_better_student_gets_taller_bars(tmp_path: Path) -> None:
    worse = draw(tmp_path / "worse.png", students=[system("distilled", np.full(40, 0.2))])
    better = draw(tmp_path / "better.png", students=[system("distilled", np.full(40, 0.8))])
    assert ink(better, "#0072b2") > 2 * ink(worse, "#0072b2")


@pytest.mark.parametrize("changes", [{"runs": []}, {"students": [], "teachers": None}, {"positives": np.zeros(40)}])
def test_whatever_is_missing_the_rest_is_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert draw(tmp_path / "picture.png", **changes).shape == (1140, 1500, 4)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    draw(tmp_path / "first.png")
    draw(tmp_path / "second.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
