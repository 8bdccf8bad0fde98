"""What a command prints: results to standard output, everything else to standard error.

Both may be a terminal, a pipe or a file, in any encoding, and may have no room: one place decides what happens then.
"""

import io
import json
import logging
import os
import sys
from abc import abstractmethod
from contextlib import suppress
from functools import cache
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.text import Text

from pipeline.errors import StorageError


class NobodyReadsError(Exception):
    """Whoever read standard output has stopped, such as `head`."""


@cache
def console() -> Console:
    """Returns the one console that results are printed to: standard output.

    Its `print` raises `NobodyReadsError` where nobody reads any more, and `StorageError` where there is no room.
    """
    return Console(file=_file(_Results()))


@cache
def status_console() -> Console:
    """Returns the console of messages, logs and progress bars: standard error, so that results can be piped.

    What can't be written there is dropped: it is no reason to end a run.
    """
    return Console(file=_file(_Messages()), stderr=True, highlight=False)


def print_table(table: RenderableType) -> None:
    """Print a table to standard output; without a terminal, where nobody knows the width, with room for all of it."""
    (console() if console().is_terminal else Console(file=_file(_Results()), width=140)).print(table)


def print_line(text: str) -> None:
    """Print a line to standard output as it is, whatever brackets are in it, and however long."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a line of JSON to standard output; it loses nothing, whatever the encoding."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(console().encoding)
    except UnicodeEncodeError:
        line = json.dumps(value)
    print_line(line)


def accept_any_text() -> None:
    """Let standard output show characters that its encoding lacks as `?`; standard error escapes them anyway.

    What a library prints is held back even under PYTHONUNBUFFERED until `flush_output`, which says what went wrong.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=sys.stdout.isatty(), write_through=False)


def flush_output() -> None:
    """Bring out what is still on its way to standard output.

    Raises:
        StorageError: there is no room for it.
    """
    console().file.flush()


def forget_messages() -> None:
    """Drop what standard error could not take, which Python would try again at its end, and fail."""
    try:
        _stream("stderr").flush()
    except (OSError, ValueError):
        _let_go(_stream("stderr"))


_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class LineHandler(logging.Handler):
    """Logs to standard error, one line a record however long it is; the same lines on a terminal and in a file."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            line = Text(f"{record.levelname:<8} ", style=_STYLES.get(record.levelno, "dim"))
            status_console().print(line.append(self.format(record), style="default"), soft_wrap=True)
        except Exception:
            self.handleError(record)


class _Stream(io.TextIOBase):
    """Standard output or error, whichever it is at the moment, as a file for a console."""

    name = ""

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it is written in."""
        return getattr(_stream(self.name), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return _stream(self.name).isatty()

    def fileno(self) -> int:
        """Its descriptor."""
        return _stream(self.name).fileno()

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return _stream(self.name).write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Bring out what was written."""
        try:
            _stream(self.name).flush()
        except OSError as error:
            self._fail(error)

    @abstractmethod
    def _fail(self, error: OSError) -> None:
        """Do what is to be done where it can't be written to."""


class _Results(_Stream):
    name = "stdout"

    def _fail(self, error: OSError) -> None:
        _let_go(_stream(self.name))  # or Python would try again at its end
        if isinstance(error, BrokenPipeError):
            raise NobodyReadsError from error
        raise StorageError(f"standard output: can't be written ({error.strerror})") from error


class _Messages(_Stream):
    name = "stderr"

    def _fail(self, error: OSError) -> None:
        pass  # what stays in the buffer is tried again with the next line


def _file(stream: _Stream) -> IO[str]:
    return cast("IO[str]", stream)


def _stream(name: str) -> Any:
    stream = getattr(sys, name)
    if stream is None:  # closed before Python began
        return io.StringIO()
    return getattr(stream, "rich_proxied_file", stream)  # while a progress bar is shown, rich stands in its place


def _let_go(stream: Any) -> None:
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
