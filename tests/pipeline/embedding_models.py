"""Small students and teachers, written as their trainings write them."""

from pathlib import Path
from typing import Any

import torch

import student
import teacher
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
"""Keywords of a student that sees one frame in 50 ms: as real as any other, and quick."""
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
"""Keywords of any transformer."""


def write_student(path: Path, vocabulary: Vocabulary, name: str = "mn01", **kwargs: Any) -> str:
    torch.manual_seed(0)
    settings = {**COARSE, **kwargs}
    model = student.create_model(name, num_classes=len(vocabulary), **settings)
    return _write(path, model, {"stage": "student", "model": name, "kwargs": settings}, vocabulary)


def write_teacher(path: Path, vocabulary: Vocabulary, name: str) -> str:
    torch.manual_seed(0)
    model = teacher.create_model(name, num_classes=len(vocabulary), **SMALL)
    return _write(path, model, {"stage": "teacher", "model": name, "kwargs": SMALL}, vocabulary)


def _write(path: Path, model: torch.nn.Module, about: dict[str, Any], vocabulary: Vocabulary) -> str:
    classes = {"classes": len(vocabulary), "vocabulary_sha256": vocabulary.sha256}
    text = {"vocabulary": vocabulary.to_csv_bytes().decode()}
    save_weights(path, model.state_dict(), about | classes | text)
    return str(path)
