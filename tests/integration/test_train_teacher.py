from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import teacher
from pipeline.checkpoints import list_checkpoints
from pipeline.errors import UsageError
from pipeline.stages.train_teacher import PatchoutConfig, TeacherAverageConfig, TrainTeacherConfig, run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path, make_dataset: Callable[..., Path]) -> TrainTeacherConfig:
    data = str(make_dataset(tmp_path / "data", clips=8))
    return TrainTeacherConfig(
        data=data,
        eval_data=data,
        run=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        model="passt_tiny",
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
        patchout=PatchoutConfig(time=5, frequency=0, single=10),
        average=TeacherAverageConfig(start_epoch=0, every_epochs=1),
        checkpoint_minutes=0,
        keep_checkpoints=10,
    )


def test_a_fine_tuned_teacher_resumes_to_the_same_bits_and_can_teach(
    config: TrainTeacherConfig, tmp_path: Path
) -> None:
    weights = tmp_path / "run" / "last.safetensors"
    assert run(replace(config, export_dtype="float16")).finished
    straight = load_file(weights)
    assert {tensor.dtype for tensor in straight.values()} == {torch.float16}
    for path in list_checkpoints(tmp_path / "run")[2:]:
        path.unlink()
    assert run(replace(config, export_dtype="float16", resume=True)).steps == 4
    assert all(torch.equal(tensor, straight[key]) for key, tensor in load_file(weights).items())
    model = teacher.create_model("passt_tiny", weights).eval()
    with torch.inference_mode():
        assert model(model.front_end(torch.zeros(1, 320_000))).shape == (1, 4)
    assert model.config.s_patchout_t == 0


def test_a_patchout_that_leaves_nothing_is_refused_at_once(config: TrainTeacherConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--patchout: too much for passt_tiny"):
        run(replace(config, patchout=PatchoutConfig(time=10_000)))
    assert not (tmp_path / "run").exists()


def test_an_unknown_teacher_is_told_by_name(config: TrainTeacherConfig) -> None:
    with pytest.raises(UsageError, match="--model pasta"):
        run(replace(config, model="pasta"))
