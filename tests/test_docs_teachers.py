"""The examples of docs/teachers.md run as they stand."""

import re
import sys
from pathlib import Path

import pytest
import torch

import teacher
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.labelling.teacher_spec import TeacherSpec
from teacher.registry import _passt

PAGE = (Path(__file__).resolve().parents[1] / "docs/teachers.md").read_text()


def test_a_tenth_teacher_is_one_line() -> None:
    (example,) = re.findall(r"^_passt\(.*\)$", PAGE, re.MULTILINE)
    card = eval(example, {"_passt": _passt})
    assert (card.name, card.config.stride, card.weights_url) == (
        "passt_birds_p16_s12",
        12,
        "https://example.org/passt-birds-s12.pt",
    )
    assert teacher.count_complexity(card) == teacher.count_complexity(teacher.model_card("passt_s_p16_s12_128_ap470"))


def test_the_module_of_ones_own_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_sounds.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_sounds", raising=False)
    torch.save({"network.weight": torch.zeros(3, 160000), "network.bias": torch.tensor([1.0, 2, 3])}, tmp_path / "t.pt")

    class Dataset:  # what `load` reads of a manifest
        vocabulary = Vocabulary((LabelClass(0, "/m/dog", "dog"), LabelClass(1, "/m/sp", "Speech")))

    loaded = TeacherSpec.parse(f"my_sounds:build={tmp_path}/t.pt").load(Dataset)  # pyright: ignore[reportArgumentType]
    logits = loaded.network(torch.zeros(1, 160000))
    torch.testing.assert_close(logits, torch.tensor([[3.0, 1.0]]))


def test_every_registered_name_that_the_page_mentions_exists() -> None:
    mentioned = set(re.findall(r"\b(?:passt|ast|ced)_\w+", PAGE)) - {"passt_birds_p16_s12"}
    assert len(mentioned) >= 4
    for name in mentioned:
        teacher.model_card(name)
