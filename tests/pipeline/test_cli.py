import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import COMMANDS
from pipeline.runtime.output import console


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_is_explained(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no name is broken into two lines
    console.cache_clear()  # it keeps the width that it found
    app = cli.build_app(command)
    for word in command.split():
        app = app[word]
    flags = {
        argument.name: argument.parameter.help
        for argument in app.assemble_argument_collection(parse_docstring=True)
        if argument.show
    }
    assert flags
    assert not [name for name, text in flags.items() if not text or len(text) < 10]
    assert cli.run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in flags)


def test_a_code_page_that_lacks_a_character_is_no_reason_to_fail() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "COLUMNS": "120"}  # as a pipe of Windows
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], env=environment, capture_output=True, check=True
    )
    assert b"Several datasets ? one" in done.stdout


def test_help_of_the_whole_needs_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from pipeline.cli import run; run(['--help']); assert not {'torch', 'ray'} & set(sys.modules), 1"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["inspect"], "path"),
        (["inspekt", "somewhere"], "inspect"),
        (["evaluate", "--data", "x", "--checkpoint", "y", "--batch-size", "many"], "batch-size"),
        (["evaluate", "--data", "x"], "nothing to score"),
        (["train-student", "--data", "x", "--run", "y", "--distill.teacher-weight", "3"], "teacher_weight is 3"),
        (["train-student", "--data", "x", "--run", "y", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert "Traceback" not in error


def test_failure_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(tmp_path / "nothing [here]")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "nothing [here]" in error
    assert "\n" not in error


def test_recipe_gives_flags_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "no_such_model"\nbatch_size = 0\n')
    command = ["train-student", "--data", "x", "--run", str(tmp_path / "run"), "--config", str(recipe)]
    assert cli.run(command) == 2
    assert "batch_size is 0" in capsys.readouterr().err
    assert cli.run([*command, "--batch-size", "4"]) == 1  # gets as far as the dataset, which isn't there
    assert "x" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--optimizer.most-gradient-norm=-1", "--optimizer.most_gradient_norm=-1"])
def test_flags_and_keys_under_their_earlier_names_are_read_and_named_once(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-student", "--data", "x", "--run", "y"]
    assert cli.run([*command, flag]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.endswith(f"{flag.removesuffix('=-1')} is called --optimizer.max-gradient-norm now")
    assert "optimizer.max_gradient_norm is -1" in error
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[optimizer]\nmost_gradient_norm = -2.0\n")
    assert cli.run([*command, "--config", str(recipe)]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.endswith(f"{recipe}: optimizer.most_gradient_norm is called optimizer.max_gradient_norm now")
    assert "optimizer.max_gradient_norm is -2" in error


def test_unknown_key_in_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("epohcs = 3\n")
    assert cli.run(["train-student", "--data", "x", "--run", "y", "--config", str(recipe)]) == 2
    assert "epohcs" in capsys.readouterr().err
    recipe.write_text("epochs = = 3\n")
    assert cli.run(["train-student", "--data", "x", "--run", "y", "--config", str(recipe)]) == 2
    assert "not a TOML file" in capsys.readouterr().err
