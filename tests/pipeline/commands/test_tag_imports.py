"""What a first tag waits for: imports are most of it, so that they are counted; seconds are measured elsewhere."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import student
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}

TAG = """
import sys
from pipeline.cli import run
code = run(sys.argv[1:])
print(code, len(sys.modules), *sorted(name for name in sys.modules if "." not in name), file=sys.stderr)
"""
NOT_FOR_A_STUDENT = {"timm", "torchvision", "torchaudio", "teacher", "ray", "pandas", "matplotlib", "sympy", "triton"}
NOT_FOR_A_STUDENT |= {"tensorboard", "webdataset", "transformers", "huggingface_hub", "onnxruntime", "pyarrow", "scipy"}


@pytest.fixture
def checkpoint(tmp_path: Path, five_classes: Vocabulary) -> str:
    model = student.create_model("mn01", num_classes=5, **COARSE)
    metadata = {
        "stage": "student",
        "model": "mn01",
        "kwargs": COARSE,
        "classes": 5,
        "vocabulary_sha256": five_classes.sha256,
        "vocabulary": five_classes.to_csv_bytes().decode(),
    }
    save_weights(tmp_path / "mn01.safetensors", model.state_dict(), metadata)
    return str(tmp_path / "mn01.safetensors")


def modules_of(*arguments: str) -> tuple[int, int, set[str]]:
    done = subprocess.run([sys.executable, "-c", TAG, *arguments], capture_output=True, text=True, check=True)
    code, count, *names = done.stderr.splitlines()[-1].split()
    return int(code), int(count), set(names)


def test_a_student_tags_without_what_it_does_not_need(
    checkpoint: str, tmp_path: Path, make_noises: Callable[..., Any]
) -> None:
    (tmp_path / "a.wav").write_bytes(make_noises(1, 5)[0][2])
    code, count, names = modules_of("tag", str(tmp_path / "a.wav"), "--checkpoint", checkpoint)
    assert code == 0
    assert names & NOT_FOR_A_STUDENT == set()
    just_torch = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(len(sys.modules))"], capture_output=True, text=True, check=True
    )
    assert count < int(just_torch.stdout) + 900


def test_a_command_that_is_refused_does_not_wait_for_torch(tmp_path: Path) -> None:
    code, _, names = modules_of("tag", str(tmp_path / "none.wav"), "--checkpoint", "mn10_as")
    assert code == 1
    assert "torch" not in names


@pytest.mark.parametrize("order", ["import student, timm", "import timm, student", "import student, timm.models"])
def test_timm_knows_the_students_whichever_is_imported_first(order: str) -> None:
    program = f"{order}; import timm; print('mn10_as' in timm.list_models(), timm.create_model('mn01').num_classes)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "527"]
