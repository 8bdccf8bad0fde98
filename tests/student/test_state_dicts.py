"""Checkpoints are read without running anything from them."""

import pytest
import torch

from student.state_dicts import describe_difference, read_checkpoint


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: not a readable"):
        read_checkpoint(path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="not a readable"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        read_checkpoint(tmp_path / "absent.pt")


def test_a_training_checkpoint_gives_its_model_without_the_wrapper(tmp_path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"state_dict": {"module.weight": torch.ones(2)}, "epoch": 3}, path)
    assert list(read_checkpoint(path)) == ["weight"]


def test_a_file_with_more_than_tensors_is_refused(tmp_path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"weight": torch.ones(2), "epoch": 3}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        read_checkpoint(path)


def test_a_long_difference_is_cut() -> None:
    expected = {f"layer{index}": (index,) for index in range(9)}
    message = describe_difference(expected, {})
    assert message.startswith("9 missing: layer0 (0,), ")
    assert message.endswith("layer4 (4,), …")
    assert describe_difference(expected, expected) == ""


@pytest.mark.parametrize(("first", "prefix"), [("features.0.0.weight", "model."), ("in_c.0.weight", "net.student.")])
def test_a_lightning_checkpoint_gives_the_network_inside(tmp_path, first, prefix, caplog) -> None:
    inside = {f"{prefix}{first}": torch.ones(2), f"{prefix}classifier.5.bias": torch.zeros(3)}
    path = tmp_path / "epoch=3.ckpt"
    torch.save({"state_dict": {"mel.window": torch.ones(1), **inside}, "epoch": 3, "loops": {"fit": [1]}}, path)
    with caplog.at_level("INFO"):
        assert list(read_checkpoint(path)) == [first, "classifier.5.bias"]
    assert "left 1, such as mel.window" in caplog.text
    assert list(read_checkpoint(inside)) == [first, "classifier.5.bias"]


def test_averaged_weights_are_preferred_and_a_bare_network_is_left_as_it_is() -> None:
    first = "features.0.0.weight"
    both = {f"model.{first}": torch.zeros(1), f"model_ema.{first}": torch.ones(1)}
    assert read_checkpoint(both)[first] == 1
    assert list(read_checkpoint({first: torch.zeros(1), "other": torch.zeros(1)})) == [first, "other"]
