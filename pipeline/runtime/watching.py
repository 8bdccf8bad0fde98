"""Waiting with a limit: whether another process still gives signs of life, and where it stands if it does not."""

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PATIENCE_SECONDS = 300.0
"""How long whoever waits for another process does without a sign of life, unless a setting says otherwise."""
LOOK_SECONDS = 0.5
"""Time between two looks at a process that is waited for."""
_DUMP_SECONDS = 1.0
_ASK = getattr(signal, "SIGUSR1", None)
"""Windows has no signal for it; there a message says only who does not answer."""

_STATES = {
    "T": "it is stopped, by SIGSTOP or a debugger",
    "t": "it is stopped by a debugger",
    "D": "the kernel holds it in a read or write that does not end, as of a disk or network share that does not answer",
    "Z": "it has ended",
    "X": "it has ended",
}
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


class Watch:
    """Measures how long somebody has been without a sign of life.

    Args:
        seconds: how long that may be.
    """

    def __init__(self, seconds: float) -> None:
        self._limit, self._silent = seconds, 0.0
        self._last: object = None
        self._looked = time.monotonic()

    def see(self, sign: object) -> None:
        """Note what can be seen of somebody; anything else than the last time is a sign of life. Look often."""
        now = time.monotonic()
        # A machine that slept, or a process group that was stopped and goes on, is no silence: nobody looked meanwhile.
        self._silent += min(now - self._looked, 10 * LOOK_SECONDS)
        self._looked = now
        if sign != self._last:
            self._last, self._silent = sign, 0.0

    @property
    def expired(self) -> bool:
        """Whether it has been too long."""
        return self.longer_than(self._limit)

    def longer_than(self, seconds: float) -> bool:
        """Whether it has been longer than some time."""
        return self._silent > seconds


def tell_where_on_request(file: BinaryIO) -> None:
    """Let this process write where its threads stand into a file, when it crashes or `where_it_stands` asks for it.

    No lock of Python's is needed for that, so a process that is stuck in one answers too.
    """
    faulthandler.enable(file)
    if _ASK is not None:
        faulthandler.register(_ASK, file)


def where_it_stands(process: int, read: Callable[[], bytes]) -> tuple[str, str]:
    """Returns where another process of this machine stands, in words, and its stack as it wrote it.

    Args:
        process: its number; it called `tell_where_on_request`.
        read: gives what it has written since the last call.

    Returns:
        A phrase such as `it is at load_waveform (pipeline/dataset/audio.py:88)`, and the whole dump; either may be
        empty.
    """
    state = _STATES.get(state_of(process), "")
    if state or _ASK is None:
        return state, ""
    read()
    try:
        os.kill(process, _ASK)
    except OSError:
        return "", ""
    dump, end = b"", time.monotonic() + _DUMP_SECONDS
    while time.monotonic() < end:
        time.sleep(0.05)
        more = read()
        if dump and not more:
            break
        dump += more
    text = dump.decode(errors="replace")
    return innermost_call(text), text


def state_of(process: int) -> str:
    """Returns the kernel's letter for what a process does (`R`, `S`, `D`, `T` …); empty where it can't be asked."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def has_ended(process: int) -> bool:
    """Whether another process of this machine has ended; False where the kernel can't be asked."""
    return state_of(process) in ("", "Z", "X") and state_of(os.getpid()) != ""


def call_of_thread(thread: int) -> str:
    """Returns which call a thread of this process is in, as `innermost_call` puts it."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else _in_words(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def innermost_call(dump: str) -> str:
    """Returns which call a process's main thread is in, from what faulthandler wrote, where that thread stands last."""
    found = _FRAME.search(dump.rpartition("most recent call first")[2])
    if found is None:
        return ""
    path, line, function = found.groups()
    return _in_words(path, int(line), function)


def _in_words(path: str, line: int, function: str) -> str:
    return f"it is at {function} ({'/'.join(Path(path).parts[-3:])}:{line})"


def how_it_ended(code: int | None) -> str:
    """Returns in words how a child process ended, from `subprocess`'s exit code; below 0 it was a signal."""
    if code is None:
        return "closed its output, though it still runs"
    if code >= 0:
        return f"ended by itself, with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "was killed (SIGKILL), as the kernel does it when memory runs out"
    return f"was ended by {name}"
