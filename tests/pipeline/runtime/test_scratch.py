import os
import tempfile
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.runtime.scratch import LONGEST_SOCKET_PATH, socket_folder


def test_the_temporary_folder_serves_where_its_path_is_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert socket_folder(60) == Path("/tmp")


def test_another_folder_serves_where_the_temporary_one_has_too_long_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("ü" * 40)  # paths count in bytes
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = socket_folder(60)
    assert folder != long
    assert os.access(folder, os.W_OK)
    assert len(os.fsencode(folder)) + 1 + 60 <= LONGEST_SOCKET_PATH


def test_a_folder_that_somebody_chose_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(PipelineError, match=r"Set RAY_TMPDIR to a folder with a shorter path"):
        socket_folder(60, variable="RAY_TMPDIR")
