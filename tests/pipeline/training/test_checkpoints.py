import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.errors import CheckpointError
from pipeline.training.checkpoints import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    save_weights,
)


def save(run: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(run, step, {"step": step, "model": {"weight": torch.full((4096,), float(step))}}, keep=keep)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 123_456_789)
    found = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == checkpoint_path(tmp_path, 123_456_789)
    assert found[1]["step"] == 123_456_789
    assert (found[1]["model"]["weight"] == 123_456_789.0).all()


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003.pt", "step-00000004.pt"]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-500])])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))  # pyright: ignore[reportCallIssue]
    with caplog.at_level(logging.WARNING):
        found = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002.pt is damaged" in caplog.text


def test_a_checkpoint_with_numbers_that_are_not_finite_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    state = {"step": 2, "model": {"weight": torch.ones(3)}, "optimizer": [{"mean": torch.tensor([0.0, torch.nan])}]}
    save_checkpoint(tmp_path, 2, state, keep=3)
    found = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "optimizer.0.mean holds numbers that are not finite; trying the one before" in caplog.text


def test_a_run_with_damaged_checkpoints_only_says_so(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints can be read"):
        load_newest_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), torch.no_grad():
        save_checkpoint(tmp_path, 1, {"model": _FailsToPickle()}, keep=1)
    assert list_checkpoints(tmp_path) == []


class _FailsToPickle:
    def __reduce__(self) -> str:
        raise RuntimeError("stopped half way")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"model": Path("x")}, path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(path)


def test_weights_carry_what_made_them(tmp_path: Path) -> None:
    save_weights(tmp_path / "last.safetensors", {"w": torch.ones(2, 3).T}, {"model": "mn10", "kwargs": {"a": 1}})
    with safe_open(tmp_path / "last.safetensors", framework="pt") as stream:
        assert json.loads(stream.metadata()["kwargs"]) == {"a": 1}
        torch.testing.assert_close(stream.get_tensor("w"), torch.ones(3, 2))
