import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StorageError, UsageError
from pipeline.storage.files import list_files, list_tree
from pipeline.storage.one_writer import one_writer

HOLD = """
import sys, time
from pipeline.storage.one_writer import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_the_first_one_is_until_that_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = f"run: is being written by process {holder.pid} on .+ since"
        try:
            with pytest.raises(UsageError, match=told), one_writer(folder):
                pass
        finally:
            holder.kill()
    with one_writer(folder):
        pass


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with one_writer(tmp_path / "new"):
        assert list_files(tmp_path / "new") == []
        assert list_tree(tmp_path) == []
    assert not (tmp_path / "new").exists()
    with one_writer(tmp_path / "full"):
        (tmp_path / "full/file").touch()
    assert os.listdir(tmp_path / "full") in (["file"], [".writer.lock", "file"], ["file", ".writer.lock"])


def test_an_error_lets_the_next_writer_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), one_writer(tmp_path):
        raise ValueError("x")
    with one_writer(tmp_path):
        pass


def test_a_place_that_can_t_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be written"), one_writer(tmp_path / "file/folder"):
        pass


def test_what_knows_neither_locks_nor_leases_keeps_nobody_out() -> None:
    with one_writer("memory://folder"), one_writer("memory://folder"):
        pass
