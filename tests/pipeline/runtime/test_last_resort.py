import errno
import os
from pathlib import Path

import pytest
from made_command import run_command

from pipeline.runtime.last_resort import explain


def test_what_no_command_foresaw_is_one_line_that_names_the_file_with_the_traceback(tmp_path: Path) -> None:
    done = run_command("password = 's3cret'\n{}['first\\nsecond']", tmp_path=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(r"error: KeyError: 'first\nsecond'. The traceback is in ")
    log = Path(line.rpartition(" ")[2]).read_text()
    assert "Traceback (most recent call last)" in log
    assert "audioset-distill" in log
    assert "s3cret" not in log  # values of variables are not shown


def test_verbose_shows_where_an_unforeseen_error_came_from(tmp_path: Path) -> None:
    done = run_command("raise KeyError('x')", "--verbose", tmp_path=tmp_path)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: KeyError: 'x'.")


def test_an_unforeseen_error_is_told_where_no_file_can_be_written(tmp_path: Path) -> None:
    body = "import tempfile; tempfile.tempdir = '/dev/null/nowhere'\nraise KeyError('x')"
    done = run_command(body, tmp_path=tmp_path)
    assert done.stderr.splitlines() == ["error: KeyError: 'x'. --verbose shows the traceback"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), ["Too many open files", "ulimit -n"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/log"), ["/runs/log: No space", "make room"]),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), b"/a"), ["/a: Permission denied"]),
        (MemoryError(), ["MemoryError", "--batch-size"]),
        (MemoryError("Unable to allocate 8 PiB"), ["8 PiB", "--batch-size"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ["2 GiB", "--batch-size"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["--workers"]),
        (RuntimeError("can't start new thread"), ["ulimit -u"]),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), ["ulimit -u"]),
        (ValueError("a\nb"), ["ValueError: a b"]),
        (ValueError("a" * 9999), ["aaa …"]),
        (ValueError("s3://user:password@host/x"), ["s3://***@host/x"]),
    ],
)
def test_errors_of_machines_are_told_on_one_line_with_what_helps(error: Exception, words: list[str]) -> None:
    told = explain(error)
    assert "\n" not in told
    assert len(told) < 700
    for word in words:
        assert word in told


def test_what_caused_an_error_is_told_with_it() -> None:
    error = ImportError("Cannot import module 'pipeline.commands.tag'")
    error.__cause__ = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    assert explain(error).startswith("ImportError: Cannot import module 'pipeline.commands.tag': ImportError: libtorch")
    assert "give it more memory" in explain(error)


def test_an_error_that_ends_a_thread_is_a_line_that_names_the_file_with_its_traceback(tmp_path: Path) -> None:
    body = "import threading\nthread = threading.Thread(target=lambda: {}['x'], name='writer')\n"
    body += "thread.start(); thread.join()"
    done = run_command(body, tmp_path=tmp_path)
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line.startswith("ERROR    thread writer ended: KeyError: 'x'. The traceback is in ")


def test_warnings_of_libraries_are_lines_of_the_log(tmp_path: Path) -> None:
    done = run_command("import warnings\nwarnings.warn('first\\nsecond')", tmp_path=tmp_path)
    [line] = done.stderr.splitlines()
    assert line.startswith("WARNING  ")
    assert line.endswith("UserWarning: first second")


def test_an_error_in_a_destructor_is_shown_to_whoever_asks(tmp_path: Path) -> None:
    body = "class Fragile:\n    def __del__(self): raise KeyError('x')\nfragile = Fragile()\ndel fragile"
    assert run_command(body, tmp_path=tmp_path).stderr == ""
    assert "KeyError: 'x'" in run_command(body, "--verbose", tmp_path=tmp_path).stderr
