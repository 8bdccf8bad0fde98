"""A thread ends what the main thread waits for."""

import subprocess
import sys

import pytest

WAITS_FOR_EVER = """
import os, threading, time
from pipeline.interruption import interrupt_main
reading, _ = os.pipe()
threading.Timer(0.5, interrupt_main).start()
try:
    os.read(reading, 1)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing ends a system call there")
def test_a_main_thread_that_waits_in_a_system_call_is_interrupted() -> None:
    command = [sys.executable, "-c", WAITS_FOR_EVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "interrupted\n"
