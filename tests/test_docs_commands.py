"""The commands that the docs show are commands that the product takes, flag by flag."""

import re
import shlex

import pytest
from cyclopts import CycloptsError, MissingArgumentError
from cyclopts.config import Toml
from documented_commands import ROOT, shown_commands
from torch.distributed.run import get_args_parser

from pipeline.cli import COMMANDS, build_app

FOR_ALL = {"--offline": 0, "--verbose": 0, "--config": 1}
"""Flags of every command, and how many values each takes."""


def words_of(command: str) -> list[str]:
    """Returns what follows `pipeline` in the first of a line's commands, as a shell splits it."""
    lexer = shlex.shlex(command.replace("2>", ">"), posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    words = list(lexer)
    words = words[words.index("pipeline") + 1 :]
    end = next((at for at, word in enumerate(words) if word in {"|", ";", "&&", "&", ">", "<", ">&"}), len(words))
    return ["/dev/stdin" if word == "-" else word for word in words[:end] if word != "--"]  # as `cli` passes it on


CASES = [pytest.param(shown.line, shown.whole, id=str(shown)) for shown in shown_commands() if shown.is_ours]
TORCHRUN = [case.values[0] for case in CASES if str(case.values[0]).startswith("torchrun")]


def test_commands_are_found() -> None:
    assert len(CASES) > 100


@pytest.mark.parametrize(("command", "whole"), CASES)
def test_a_shown_command_has_flags_that_there_are(command: str, whole: bool) -> None:
    words = words_of(command)
    app = build_app()
    recipe = ROOT / words[words.index("--config") + 1] if "--config" in words else None
    if recipe is not None and recipe.is_file():
        app.config = (Toml(recipe, must_exist=True, use_commands_as_keys=False),)
    for flag, values in FOR_ALL.items():
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 1 + values]
    words = [word for word in words if not re.fullmatch(r"…|\[[-…].*|[^\[]*\]", word)]
    assert any(f"{name} ".startswith(f"{' '.join(words)} "[: len(name) + 1]) for name in COMMANDS)
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except MissingArgumentError:
        if whole:
            raise


@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_leaves_our_flags_to_us(command: str) -> None:
    words = [word for word in command.split() if word != "…"]
    given = get_args_parser().parse_args([*words[words.index("torchrun") + 1 :], "--run", "runs/mn10"])
    assert given.training_script == "pipeline"
    assert given.training_script_args[-2:] == ["--run", "runs/mn10"]


def test_a_flag_that_there_is_not_is_seen() -> None:
    with pytest.raises(CycloptsError):
        test_a_shown_command_has_flags_that_there_are("pipeline verify data --nowhere 3", True)
