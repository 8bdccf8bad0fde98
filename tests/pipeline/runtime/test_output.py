import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_command import command_line, run_command

TABLE = "from rich.table import Table\nfrom pipeline.runtime.output import print_table, print_json, print_line\n"


def on_terminal(command: list[str]) -> str:
    pty = pytest.importorskip("pty")
    shown, terminal = pty.openpty()
    with subprocess.Popen(
        command, stdout=terminal, stderr=terminal, stdin=terminal, env={**os.environ, "TERM": "dumb"}
    ):
        os.close(terminal)
        text = b""
        while True:
            try:
                got = os.read(shown, 1 << 16)
            except OSError:  # nobody has the other side any more
                got = b""
            if not got:
                os.close(shown)
                return text.decode().replace("\r\n", "\n")
            text += got


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_lines_are_the_same_on_a_terminal_and_in_a_log(tmp_path: Path) -> None:
    path = "/a/very/long/path" * 20
    body = f"""
log.info("%s: [bold]read[/]", {path!r})
log.warning("ü")
from pipeline.errors import PipelineError
raise PipelineError("{path}: [x] is not there")
"""
    in_log = run_command(body, tmp_path=tmp_path).stderr
    assert in_log.splitlines() == [
        f"INFO     {path}: [bold]read[/]",
        "WARNING  ü",
        f"error: {path}: [x] is not there",
    ]
    assert on_terminal(command_line(body)) == in_log


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_are_shown_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    body = f"{TABLE}table = Table('a · b')\ntable.add_row('音 é \\udce9')\nprint_table(table)\nprint_line('ü')"
    done = subprocess.run(
        command_line(body), capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert ("·" in text, "音" in text, "é" in text) == (encoding != "ascii", encoding == "utf-8", encoding != "ascii")


def test_tables_are_shown_in_a_locale_without_any_encoding(tmp_path: Path) -> None:
    body = f"{TABLE}print_line('a \\u00b7 b')"
    done = run_command(
        body, tmp_path=tmp_path, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING=""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a ? b\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_loses_nothing_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    value = {"file": "音é\udce9.wav", "tag": "[bold]" + 200 * "x"}
    done = run_command(f"{TABLE}print_json({value!r})", tmp_path=tmp_path, PYTHONIOENCODING=encoding)
    [line] = done.stdout.splitlines()
    assert json.loads(line) == value


def redirected(body: str, redirection: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command_line(body)], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_output_that_finds_no_room_is_one_line() -> None:
    for body in (f"{TABLE}print_line('x')", "print('x')"):  # as a library would
        done = redirected(body, "> /dev/full")
        assert done.stderr.splitlines() == ["error: standard output: can't be written (No space left on device)"]
        assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_messages_that_find_no_room_end_nothing() -> None:
    done = redirected(f"{TABLE}log.info('x')\nprint_line('done')", "2> /dev/full")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_whoever_stops_reading_is_no_error() -> None:
    body = f"{TABLE}import time\nfor number in range(2000): print_line(100 * 'x')"
    command = ["sh", "-c", '{ "$@"; echo $? >&2; } | head -n 1', "sh", *command_line(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (100 * "x" + "\n", "0\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_ends_nothing(closed: str) -> None:
    assert redirected(f"{TABLE}log.info('x')\nprint_line('x')", closed).returncode == 0
