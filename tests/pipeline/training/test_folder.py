"""A run's folder is gone on with by whom it belongs to: a resume that was asked for, or the launch that began it."""

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.training.folder import RunFolder
from pipeline.training.loop import TrainingConfig
from pipeline.training.ranks import LAUNCH_VARIABLE, launch_id


@pytest.fixture(params=["disk", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TrainingConfig:
    if request.param == "disk":
        return TrainingConfig(data="data", run=str(tmp_path / "run"))
    return TrainingConfig(data="data", run=request.getfixturevalue("s3_folder") + "/run")


def begin(config: TrainingConfig, launch: str | None) -> RunFolder:
    folder = RunFolder(config, launch)
    folder.begin()
    folder.publish()
    return folder


def test_a_launch_goes_on_with_the_run_that_it_began(config: TrainingConfig) -> None:
    begin(config, "one").close()
    begin(config, "one").close()


@pytest.mark.parametrize("launch", ["another", None])
def test_no_other_launch_takes_a_run_over(config: TrainingConfig, launch: str | None) -> None:
    begin(config, "one").close()
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder(config, launch)


def test_a_run_without_a_launch_is_nobodys_to_go_on_with(config: TrainingConfig) -> None:
    begin(config, None).close()
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder(config, "one")


def test_launches_that_torchrun_gives_no_name_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "42")
    assert launch_id() == "42"
    monkeypatch.setenv(LAUNCH_VARIABLE, "none")
    assert launch_id() is None
    monkeypatch.delenv(LAUNCH_VARIABLE)
    assert launch_id() is None
