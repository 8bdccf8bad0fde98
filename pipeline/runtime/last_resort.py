"""What no command foresaw, in one line: what went wrong, what may help, and which file holds the traceback."""

import errno
import logging
import os
import platform
import sys
import tempfile
import threading
import warnings
from importlib.metadata import version

from pipeline.redaction import redact, redacted_traceback

_MAX_CHARACTERS = 500
_MEMORY = "give it more memory, or take a smaller --batch-size or fewer --workers"
_THREADS = "allow it more processes, such as with `ulimit -u`, or more memory, or take fewer --workers"
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EMFILE: "allow it more open files, such as with `ulimit -n 4096`, or take fewer --workers",
    errno.ENFILE: "the machine has too many open files: end what opened them",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _THREADS,
}
_SAID_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "unable to allocate",
    "malloc of size",
    "failed to map segment",
)

_log = logging.getLogger(__name__)


def explain(error: BaseException) -> str:
    """Returns what an error and those that caused it say, on one line, and what may help against them."""
    said = [_said(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        said.append(_said(error))
    return redact(": ".join(said))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    remedy = ""
    if isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in _SAID_OF_MEMORY):
        remedy = _MEMORY
    elif isinstance(error, OSError):
        remedy = _REMEDIES.get(error.errno or 0, "")
        if error.strerror:
            name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
            said = ": ".join(filter(None, (name, error.strerror)))
    elif "can't start new thread" in text:
        remedy = _THREADS
    said = said if len(said) <= _MAX_CHARACTERS else f"{said[:_MAX_CHARACTERS]} …"
    return f"{said} ({remedy})" if remedy else said


def keep_traceback(error: BaseException) -> str:
    """Write a traceback to a new file of the temporary folder; returns a sentence that says where it is."""
    trace = redacted_traceback(type(error), error, error.__traceback__)
    about = f"audioset-distill {version('audioset-distill')}, Python {platform.python_version()}, {platform.platform()}"
    command = redact(" ".join(sys.argv))
    try:
        descriptor, path = tempfile.mkstemp(prefix="pipeline-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{about}\n{command}\n\n{trace}")
    except OSError:  # no room, or no such folder
        return "--verbose shows the traceback"
    return f"The traceback is in {path}"


def speak_in_lines() -> None:
    """Let what Python and its libraries would print past us come as lines of the log.

    An error that ends a thread names the file of its traceback; warnings name their place; errors in destructors,
    which change nothing, are only shown with --verbose.
    """
    threading.excepthook = _tell_of_thread
    sys.unraisablehook = _tell_of_ignored
    warnings.showwarning = _tell_of_warning


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = "a thread" if args.thread is None else f"thread {args.thread.name}"
        _log.error("%s ended: %s. %s", name, explain(args.exc_value), keep_traceback(args.exc_value))


def _tell_of_ignored(args: "sys.UnraisableHookArgs") -> None:
    if args.exc_value is not None:
        _log.debug("ignored in %r: %s", args.object, explain(args.exc_value))


def _tell_of_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    _log.warning("%s:%d: %s: %s", filename, lineno, category.__name__, " ".join(str(message).split()))
