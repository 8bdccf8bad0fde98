"""The docs name files, modules and rooms that are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "manifests").rglob("*.md")]
FILE = re.compile(r"\b(?:pipeline|teacher|student|manifests|tests|benchmarks)(?:/\w+)*/\w+\.(?:py|toml|ya?ml|csv|md)\b")
MODULE = re.compile(r"`(?:python -m )?((?:pipeline|teacher|student|benchmarks)(?:\.[a-z_0-9]+)+)\b")
CHANGELOG = ROOT / "CHANGELOG.md"  # speaks of what was, too


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG], ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    assert [name for name in MODULE.findall(text) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """Whether it is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    source = ROOT / Path(*module.split("."))
    texts = [path.read_text() for path in (source.with_suffix(".py"), source / "__init__.py") if path.exists()]
    return importlib.util.find_spec(name) is not None if source.is_dir() else any(attribute in text for text in texts)


def test_every_room_stands_in_the_tree_of_the_readme_and_says_what_lives_there() -> None:
    readme = (ROOT / "README.md").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) >= 13
    for room in rooms:
        assert f"  {room.name}/ " in readme
        assert re.search(rf"\b{room.name}\b", contributing)
        said = (room / "__init__.py").read_text()
        assert re.fullmatch(r'"""[^"]+"""\n', said), "a docstring, and nothing else"
        assert len(said.strip().splitlines()) <= 5
