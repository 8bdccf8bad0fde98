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
import gc, sys
from pipeline.cli import run
code = run(sys.argv[1:])
print(code, gc.get_freeze_count(), *sys.modules, file=sys.stderr)
"""
ITS_OWN = {"pipeline", "student"}
COMMAND_LINE = {"cyclopts", "attr", "attrs", "rich", "tomli_w"}
SOUND = {"av", "soundfile", "soxr"}
FILES = {"filelock", "obstore", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "safetensors"}
TORCH = {"torch", "torchgen", "numpy", "tqdm", "typing_extensions"}
FOR_A_STUDENT = ITS_OWN | COMMAND_LINE | SOUND | FILES | TORCH
NOT_FOR_A_STUDENT = {
    "timm",
    "torchvision",
    "torchaudio",
    "teacher",
    "ray",
    "pandas",
    "matplotlib",
    "sympy",
    "triton",
    "fsspec",
}
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


def modules_of(*arguments: str) -> tuple[int, int, list[str]]:
    """Returns the exit code, how many objects are never searched for garbage, and the modules that were imported."""
    done = subprocess.run([sys.executable, "-c", TAG, *arguments], capture_output=True, text=True, check=True)
    code, frozen, *names = done.stderr.splitlines()[-1].split()
    return int(code), int(frozen), names


def packages_of(names: list[str]) -> set[str]:
    """Returns the packages that modules belong to, but for Python's own and what belongs to their machinery."""
    packages = {name.partition(".")[0] for name in names}
    return {name for name in packages - sys.stdlib_module_names if not name.startswith(("_", "cython_runtime"))}


def test_a_student_tags_without_what_it_does_not_need(
    checkpoint: str, tmp_path: Path, make_noises: Callable[..., Any]
) -> None:
    (tmp_path / "a.wav").write_bytes(make_noises(1, 5)[0][2])
    code, frozen, names = modules_of("tag", str(tmp_path / "a.wav"), "--checkpoint", checkpoint)
    assert code == 0
    assert packages_of(names) & NOT_FOR_A_STUDENT == set()
    assert not {"torch._dynamo", "torch._inductor"} & set(names)
    assert packages_of(names) <= FOR_A_STUDENT
    program = "import gc, sys, torch; print(len(gc.get_objects()), *sys.modules)"
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(names) < len(alone) + 450
    assert frozen > int(alone[0])


def test_a_command_that_is_refused_does_not_wait_for_torch(tmp_path: Path) -> None:
    code, _, names = modules_of("tag", str(tmp_path / "none.wav"), "--checkpoint", "mn10_as")
    assert code == 1
    assert "torch" not in names


@pytest.mark.parametrize("order", ["import student, timm", "import timm, student", "import student, timm.models"])
def test_timm_knows_the_students_whichever_is_imported_first(order: str) -> None:
    program = f"{order}; import timm; print('mn10_as' in timm.list_models(), timm.create_model('mn01').num_classes)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "527"]
