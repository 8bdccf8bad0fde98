"""Every weight that the field's list names is registered, and nothing else claims to be released."""

import re
from itertools import product
from pathlib import Path

import pytest

import student
import teacher


@pytest.fixture(scope="module")
def field(golden_dir: Path) -> str:
    path = golden_dir.parent / "FIELD.md"
    if not path.exists():
        pytest.skip("the list of released weights, ../shared/FIELD.md, is not beside this checkout")
    (section,) = re.findall(r"## 4\. Released weights\n(.*?)\n## ", path.read_text(), re.DOTALL)
    return section


def expand(pattern: str) -> list[str]:
    """`a{1,2_{x,y}}` → every name that the braces stand for."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        return [pattern]
    return [
        name
        for choice in inner[1].split(",")
        for name in expand(pattern[: inner.start()] + choice + pattern[inner.end() :])
    ]


def line(section: str, project: str) -> str:
    (found,) = [line for line in section.splitlines() if line.startswith(f"- {project}")]
    return found


def urls(package) -> set[str]:
    return {url for name in package.model_names() if (url := package.model_card(name).weights_url)}


def test_every_student(field: str) -> None:
    base, *patterns = re.findall(r"`([^`]+)`", line(field, "EfficientAT"))
    assert urls(student) == {base + name for pattern in patterns for name in expand(pattern)}


def test_every_passt(field: str) -> None:
    base, *patterns = re.findall(r"`([^`]+)`", line(field, "PaSST"))
    expected, folder = set(), ""
    for pattern in patterns:
        first, slash, rest = pattern.partition("/")
        folder, pattern = (first, rest) if slash else (folder, pattern)
        expected |= {f"{base}{folder}/{name.replace('…', 'passt-s-f128-p16')}" for name in expand(pattern)}
    assert {url for url in urls(teacher) if "PaSST" in url} == expected


@pytest.mark.parametrize("project", ["AST", "CED"])
def test_every_model_on_the_hub(field: str, project: str) -> None:
    (pattern,) = [text for text in re.findall(r"`([^`]+)`", line(field, project)) if "{" in text]
    ids = expand(pattern.replace(", ", ","))
    expected = {f"https://huggingface.co/{name}/resolve/main/model.safetensors" for name in ids}
    owner = ids[0].partition("/")[0]
    assert {url for url in urls(teacher) if f"/{owner}/" in url} == expected


def test_a_released_files_name_and_its_card_tell_the_same_map() -> None:
    for package, name in [*product([student], student.model_names()), *product([teacher], teacher.model_names())]:
        card = package.model_card(name)
        told = re.search(r"(?:mAP_|ap\.|audioset-\d\d-\d\d-0\.)(\d+)", card.weights_url or "")
        if told:
            assert float(f"0.{told[1]}") == pytest.approx(card.published_map, abs=0.001), name
        assert card.licence
        assert card.paper.startswith("https://arxiv.org/abs/")
