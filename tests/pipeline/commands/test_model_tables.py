"""`pipeline teachers` and `pipeline students` list every name with its figures, for people and for scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import student
import teacher
from pipeline import cli
from pipeline.models.model_counting import count_models
from pipeline.models.model_tables import Stage, model_facts


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def test_teachers_are_listed_with_what_they_cost(torch_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = torch_home / "hub/checkpoints/passt-s-kd-ap.486.pt"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert cli.run(["teachers", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows.keys() >= set(teacher.model_names())
    best = rows["passt_s_kd_p16_128_ap486"]
    assert (best["sample_rate_hz"], best["input_seconds"], best["published_map"]) == (32000, 10.0, 0.486)
    assert (best["parameters"], best["licence"], best["cached"]) == (85_748_495, "Apache-2.0", str(cached))
    assert 254e9 < best["flops_per_clip"] < 255e9
    assert rows["passt_s_swa_p16_128_ap476"]["aliases"] == ["passt_s"]
    assert rows["passt_s_swa_p16_128_ap476"]["cached"] is None

    assert cli.run(["teachers"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in teacher.model_names())
    assert "255 GFLOPs" in table
    assert rows["beats_iter1"]["weights_page"].startswith("https://github.com/microsoft/unilm/")
    [beats] = [line for line in table.splitlines() if "beats_iter1" in line]
    assert "by hand" in beats


def test_students_are_listed_with_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["students", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows.keys() == {name for name in student.model_names() if student.model_card(name).weights_url}
    row = rows["mn10_as"]
    assert (row["parameters"], row["macs_per_clip"], row["published_map"]) == (4_876_831, 541_085_095, 0.471)
    assert (row["peak_activation_bytes_fp16"], row["licence"]) == (5_120_000, "MIT")
    assert rows["dymn10_as"]["macs_per_clip"] == 582_018_719

    assert cli.run(["students"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in rows)
    assert "541 M MACs" in table


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_the_facts_in_the_tables_are_those_of_the_models_themselves(stage: Stage) -> None:
    advice = "run `python -m pipeline.models.model_counting` after a change of a registry"
    assert model_facts(stage) == count_models(stage), advice


@pytest.mark.parametrize("command", ["students", "teachers"])
def test_a_list_needs_no_library_that_takes_seconds_to_import(command: str) -> None:
    script = (
        f"import sys; from pipeline.cli import run; assert run([{command!r}]) == 0; "
        "assert not {'torch', 'timm', 'ray', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
