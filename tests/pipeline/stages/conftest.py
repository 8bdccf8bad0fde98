"""Small teachers with random weights, and a Ray that all tests of a session share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import teacher
from pipeline.checkpoints import save_weights
from pipeline.vocabulary import Vocabulary

TeacherMaker = Callable[..., str]


@pytest.fixture
def make_teacher(tmp_path: Path, five_classes: Vocabulary) -> TeacherMaker:
    """Give `make(name, seed=0, change=…)`: writes a teacher's weights, spells it as `--teacher` takes it."""

    def make(name: str, *, seed: int = 0, change: Callable[[nn.Module], object] = lambda network: None) -> str:
        torch.manual_seed(seed)
        network = teacher.create_model(name, num_classes=len(five_classes))
        with torch.no_grad():
            network.get_classifier().get_parameter("bias").uniform_(-6, -1)  # logits apart, as trained ones are
            change(network)
        path = tmp_path / f"{name}-{seed}.safetensors"
        metadata = {
            "stage": "teacher",
            "model": name,
            "kwargs": {},
            "classes": len(five_classes),
            "vocabulary_sha256": five_classes.sha256,
        }
        save_weights(path, network.state_dict(), metadata)
        return f"{name}={path}"

    return make


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Starting Ray takes seconds, so runs join this one."""
    from pipeline.stages.ray_pool import running_ray

    with running_ray(None):
        yield
