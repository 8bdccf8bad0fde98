import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.scoring.report import (
    EvaluationReport,
    SystemScores,
    differences,
    per_class_csv,
    report_json,
    score_table,
    write_report,
)

NAN = float("nan")


def system(
    name: str, average_precision: list[float], sha256: str = "", replicates: tuple[float, ...] = ()
) -> SystemScores:
    scores = np.array(average_precision)
    return SystemScores(
        name=name,
        source=f"runs/{name}",
        sha256=sha256,
        mean_average_precision=float(np.nanmean(scores)),
        mean_roc_auc=0.75,
        d_prime=0.954,
        average_precision=scores,
        roc_auc=np.where(np.isnan(scores), NAN, 0.75),
        class_d_prime=np.where(np.isnan(scores), NAN, 0.954),
        replicates=np.array(replicates),
    )


@pytest.fixture
def report() -> EvaluationReport:
    return EvaluationReport(
        data="runs/[eval]",
        clips=4,
        clip_ids_sha256="0123456789abcdef",
        class_mids=("/m/1", "/m/2", "/m/3"),
        class_names=("Speech", "Dog, barking", "Harp"),
        positives=np.array([3, 0, 1]),
        failures=(("a", "cut short"), ("b", "no sound"), ("c", "no sound")),
        systems=(system("teachers", [0.5, NAN, 1.0]), system("mn04", [0.25, NAN, 0.5], "ab" * 32)),
    )


def test_the_table_puts_the_systems_side_by_side_over_the_clips_they_share(report: EvaluationReport) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(report))
    text = console.export_text()
    assert re.search(r"teachers\W+0\.7500\W+0\.7500\W+0\.954", text)
    assert re.search(r"mn04\W+0\.3750", text)
    words = " ".join(text.split())
    assert "4 clips of runs/[eval], ids sha256 0123456789ab" in words
    assert "2 of 3 classes; the 1 without positives left out" in words
    assert words.index("2 clips not scored: no sound") < words.index("1 clips not scored: cut short")


def test_intervals_stand_beside_the_scores_and_differences_are_paired(report: EvaluationReport) -> None:
    shaky = (0.1, 0.3, 0.5, 0.7, 0.9)
    first, second = system("a", [0.6], replicates=shaky), system("b", [0.5], replicates=tuple(x - 0.1 for x in shaky))
    resampled = replace(report, systems=(first, second))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(resampled))
    text = console.export_text()
    assert "95 % interval" in text
    assert re.search(r"a\W+0\.6000\W+0\.1200 to 0\.8800\W+0\.7500", text)
    assert "intervals from 5 draws of the 4 clips, with replacement" in " ".join(text.split())
    (difference,) = differences(resampled.systems)
    assert difference.beyond_chance  # however shaky the scores, the one is above the other on any clips
    found = json.loads(report_json(resampled))
    assert found["systems"][1]["mAP_interval"] == pytest.approx([0.02, 0.78])
    assert found["differences"] == [
        {
            "system": "a",
            "baseline": "b",
            "mAP": pytest.approx(0.1),
            "mAP_interval": pytest.approx([0.1, 0.1]),
            "beyond_chance": True,
        }
    ]
    assert found["bootstrap"] == {"replicates": 5, "confidence": 0.95}


def test_without_replicates_no_interval_is_shown(report: EvaluationReport) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(report))
    assert "interval" not in console.export_text()
    assert differences(report.systems) == []
    found = json.loads(report_json(report))
    assert found["differences"] == []
    assert found["systems"][0]["mAP_interval"] is None


def test_the_csv_has_a_row_a_class_and_leaves_absent_scores_empty(report: EvaluationReport) -> None:
    rows = list(csv.DictReader(io.StringIO(per_class_csv(report).decode())))
    assert [row["name"] for row in rows] == ["Speech", "Dog, barking", "Harp"]
    assert rows[0] == {
        "index": "0",
        "mid": "/m/1",
        "name": "Speech",
        "positives": "3",
        "ap:teachers": "0.5",
        "roc_auc:teachers": "0.75",
        "d_prime:teachers": "0.954",
        "ap:mn04": "0.25",
        "roc_auc:mn04": "0.75",
        "d_prime:mn04": "0.954",
    }
    assert rows[1]["positives"] == "0"
    assert rows[1]["ap:mn04"] == ""


def test_the_json_says_what_was_scored_and_what_was_not(report: EvaluationReport) -> None:
    found = json.loads(report_json(report))
    assert found["clips"] == 4
    assert found["classes_without_positives"] == 1
    assert found["clips_not_scored"] == {"no sound": 2, "cut short": 1}
    assert found["not_scored"][0] == {"clip_id": "a", "reason": "cut short"}
    assert [(one["name"], one["sha256"], one["mAP"]) for one in found["systems"]] == [
        ("teachers", None, 0.75),
        ("mn04", "ab" * 32, 0.375),
    ]


def test_a_report_is_two_files_and_equal_reports_are_equal_bytes(report: EvaluationReport, tmp_path: Path) -> None:
    locations = write_report(tmp_path / "first", report)
    assert [Path(location).name for location in locations] == ["report.json", "per_class.csv"]
    for location in locations:
        again = write_report(tmp_path / "second", report)
        assert Path(location).read_bytes() in {Path(other).read_bytes() for other in again}


def test_a_system_is_found_by_its_name(report: EvaluationReport) -> None:
    assert report.system("mn04").source == "runs/mn04"
    with pytest.raises(KeyError):
        report.system("mn10")
