"""A thread ends what the main thread waits for."""

import signal
import subprocess
import sys

import pytest

WAITS_FOR_EVER = """
import os, signal, threading, time
from pipeline.interruption import interrupt_main
signal.signal(signal.SIGINT, signal.{handler})
reading, _ = os.pipe()
threading.Timer(0.5, interrupt_main).start()
try:
    os.read(reading, 1)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing ends a system call there")
def test_a_main_thread_that_waits_in_a_system_call_is_interrupted() -> None:
    command = [sys.executable, "-c", WAITS_FOR_EVER.format(handler="default_int_handler")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="nothing ends a system call there")
def test_a_process_in_the_background_which_is_deaf_to_interrupts_is_ended() -> None:
    command = [sys.executable, "-c", WAITS_FOR_EVER.format(handler="SIG_IGN")]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGTERM
