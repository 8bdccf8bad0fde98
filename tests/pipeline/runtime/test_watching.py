import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.runtime import watching
from pipeline.runtime.watching import (
    Watch,
    call_of_thread,
    has_ended,
    how_it_ended,
    innermost_call,
    state_of,
    where_it_stands,
)


def test_silence_is_counted_from_the_last_sign_of_life() -> None:
    watch = Watch(0.3)
    for sign in range(4):
        time.sleep(0.15)
        watch.see(sign)
        assert not watch.expired
    for _ in range(3):
        time.sleep(0.15)
        watch.see(3)
    assert watch.expired


def test_a_machine_that_slept_is_not_taken_for_a_silent_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(watching.time, "monotonic", lambda: now)
    watch = Watch(60)
    watch.see(1)
    now += 3600
    watch.see(1)
    assert not watch.expired


def test_a_stopped_process_is_said_to_be_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        process.send_signal(signal.SIGSTOP)
        while state_of(process.pid) != "T":
            time.sleep(0.01)
        assert where_it_stands(process.pid, bytes) == ("it is stopped, by SIGSTOP or a debugger", "")
        process.kill()


def test_the_main_thread_s_innermost_call_is_named() -> None:
    dump = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x2 (most recent call first):
  File "/somewhere/pipeline/dataset/audio.py", line 88 in load_waveform
  File "<string>", line 1 in <module>
"""
    assert innermost_call(dump) == "it is at load_waveform (pipeline/dataset/audio.py:88)"
    assert innermost_call("") == ""


def test_the_end_of_a_process_is_told_in_words() -> None:
    assert how_it_ended(3) == "ended by itself, with exit code 3"
    assert how_it_ended(-9) == "was killed (SIGKILL), as the kernel does it when memory runs out"
    assert how_it_ended(-11) == "was ended by SIGSEGV"
    assert how_it_ended(-99) == "was ended by signal 99"


def test_a_process_that_ended_is_known_to_have_ended_whether_or_not_somebody_asked_for_its_code() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not has_ended(process.pid)
        process.kill()
        while state_of(process.pid) != "Z":
            time.sleep(0.01)
        assert has_ended(process.pid)
    assert has_ended(process.pid)


def test_the_call_that_another_thread_is_in_is_named() -> None:
    begun, ended = threading.Event(), threading.Event()

    def stand_still() -> None:
        begun.set()
        ended.wait()

    thread = threading.Thread(target=stand_still)
    thread.start()
    begun.wait()
    time.sleep(0.1)
    assert call_of_thread(thread.ident or 0).startswith("it is at wait (")
    ended.set()
    thread.join()
