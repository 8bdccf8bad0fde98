import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from cyclopts.config import Toml

import manifests
from pipeline.commands import (
    finetune_dcase20,
    finetune_esc50,
    finetune_fsd50k,
    finetune_openmic,
    teacher_logits,
    train_student,
    train_teacher,
)
from pipeline.runtime.recipes import differences, read_options, to_toml
from student import DistillConfig, MixupConfig

RECIPES = sorted(Path(next(iter(manifests.__path__)), "recipes").glob("*.toml"))


FINETUNING = {
    "finetune_esc50": finetune_esc50.run,
    "finetune_fsd50k": finetune_fsd50k.run,
    "finetune_openmic": finetune_openmic.run,
    "finetune_dcase20": finetune_dcase20.run,
}


def parse(run: Callable, recipe: Path | None, *flags: str) -> Any:
    """Read a recipe, if there is one, as the command line does."""
    settings = () if recipe is None else (Toml(recipe, must_exist=True, allow_unknown=False),)
    app = App(config=settings, exit_on_error=False, print_error=False)
    app.default(run)
    return app.parse_args(flags)[1].args[0]


def test_a_run_s_settings_come_back_from_their_file(tmp_path: Path) -> None:
    config = train_student.TrainStudentConfig(
        data='a folder/with "quotes"\\ and ünï\x7f',
        run="r",
        learning_rate=1e-5,
        cache_audio=True,
        model_options={"head_type": "fully_convolutional", "strides": [2, 2, 2, 1], "dropout": 0.1},
        distill=DistillConfig(teacher_weight=1.0),
        mixup=MixupConfig(alpha=0.0),
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    again = parse(train_student.run, tmp_path / "config.toml")
    options = read_options(again.model_options)
    assert options == config.model_options
    assert {**asdict(again), "model_options": options} == asdict(config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_command(recipe: Path) -> None:
    teaches = "passt" in recipe.stem or "ast_" in recipe.stem
    labels = recipe.stem == "three_teachers"
    run = train_teacher.run if teaches else FINETUNING.get(recipe.stem, train_student.run)
    config = parse(teacher_logits.run if labels else run, recipe, "--data", "d", "--store" if labels else "--run", "r")
    for key, value in tomllib.loads(recipe.read_text()).items():
        found: Any = list(config.teacher) if key == "teacher" else getattr(config, key)
        if key == "model_options":
            assert read_options(found) == value
            continue
        assert (asdict(found) | value == asdict(found)) if isinstance(value, dict) else found == value


def test_the_recipe_of_the_paper_is_the_default() -> None:
    found = {path.stem: path for path in RECIPES}
    student = parse(train_student.run, found["mn10_as"], "--data", "d", "--run", "r")
    assert student == train_student.TrainStudentConfig(data="d", run="r")
    for name, run in FINETUNING.items():
        assert parse(run, found[name], "--run", "r") == parse(run, None, "--run", "r")
    passt = parse(train_teacher.run, found["passt_s"], "--data", "d", "--run", "r")
    assert passt == train_teacher.TrainTeacherConfig(data="d", run="r")


def test_one_flag_of_a_table_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    config = parse(
        train_teacher.run, tmp_path / "empty.toml", "--data", "d", "--run", "r", "--optimizer.weight-decay", "0.5"
    )
    assert (config.optimizer.kind, config.optimizer.weight_decay) == ("adamw", 0.5)


@dataclass
class Inner:
    depth: int = 1


@dataclass
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)


def test_differences_name_the_setting_and_both_values() -> None:
    old, new = to_toml(Outer()), to_toml(Outer(name="y", inner=Inner(depth=2)))
    assert differences(old, new, free=frozenset()) == ["inner.depth: 1 → 2", "name: x → y"]
    assert differences(old, new, free=frozenset({"name"})) == ["inner.depth: 1 → 2"]
    assert differences(old, old, free=frozenset()) == []


def test_a_setting_under_its_earlier_name_is_no_difference() -> None:
    old, new = "[optimizer]\nmost_gradient_norm = 1.0\n", "[optimizer]\nmax_gradient_norm = 1.0\n"
    assert differences(old, new, free=frozenset()) == []
    changed = new.replace("1.0", "2.0")
    assert differences(old, changed, free=frozenset()) == ["optimizer.max_gradient_norm: 1.0 → 2.0"]


@dataclass
class EveryKind:
    text: str = 'a folder/with "quotes"\\ and ünï\x7f\n'
    whole: int = 120
    large: int = 10**16
    part: float = 1e-5
    on: bool = True
    absent: str | None = None
    names: tuple[str, ...] = ("a b", "c")
    none: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: {"head type": "mlp", "strides": [2, 1], "rate": 0.1})
    inner: Inner = field(default_factory=Inner)
    url: str = "s3://bucket/train"


EVERY_KIND = EveryKind()

# As earlier versions wrote it into runs and checkpoints, by a function of their own.
OF_OLD = r"""text = "a folder/with \"quotes\"\\ and ünï\u007f\n"
whole = 120
large = 10000000000000000
part = 1e-05
on = true
names = ["a b", "c"]
none = []
url = "s3://bucket/train"

[options]
"head type" = "mlp"
strides = [2, 1]
rate = 0.1

[inner]
depth = 1
"""


def test_settings_in_runs_of_old_read_as_those_of_today() -> None:
    assert tomllib.loads(OF_OLD) == tomllib.loads(to_toml(EVERY_KIND))
    assert differences(OF_OLD, to_toml(EVERY_KIND), free=frozenset()) == []
    assert differences(OF_OLD, to_toml(replace(EVERY_KIND, whole=60)), free=frozenset()) == ["whole: 120 → 60"]


def test_options_from_a_command_line_are_read_as_values() -> None:
    given = {
        "width-mult": "0.3",
        "dilated": "True",
        "strides": ["2", "1"],
        "head_type": "mlp",
        "heads": 4,
    }
    assert read_options(given) == {
        "width_mult": 0.3,
        "dilated": True,
        "strides": [2, 1],
        "head_type": "mlp",
        "heads": 4,
    }
