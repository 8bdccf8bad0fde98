"""One writer in a folder of an object store: a lease that its holder renews."""

import subprocess
import sys
import threading
import time

import pytest
from object_servers import Fault, Proxy

from pipeline.errors import PipelineError, UsageError
from pipeline.storage import files as storage
from pipeline.storage import one_writer as one_writer_module
from pipeline.storage.one_writer import one_writer
from pipeline.storage.remote import leases

HOLD = """
import sys, time
from pipeline.storage import one_writer
one_writer._RENEW_SECONDS = 0.3
one_writer._machine = lambda: "another"
with one_writer.one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_writer_module, "_RENEW_SECONDS", 0.2)
    monkeypatch.setattr(one_writer_module, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(one_writer_module, "_ABANDONED_SECONDS", 2.0)


def test_a_second_writer_of_another_machine_is_told_who_the_first_one_is_until_that_is_dead(s3_folder: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, s3_folder], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = f"is being written by process {holder.pid} on .+ since"
        try:
            with pytest.raises(UsageError, match=told), one_writer(s3_folder):
                pass
        finally:
            holder.kill()
    with one_writer(s3_folder):
        pass


def test_a_lease_of_a_process_of_this_machine_that_is_dead_holds_nobody_up(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_writer_module, "_ABANDONED_SECONDS", 1000.0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    about = one_writer_module._about_this_process() | {"process": ended.pid, "run": "x"}
    assert leases.put_if(f"{s3_folder}/.writer.json", one_writer_module.json.dumps(about).encode(), None)
    with one_writer(s3_folder):
        pass


def test_of_writers_that_come_at_once_one_gets_the_lease(s3_folder: str) -> None:
    put = [leases.put_if(f"{s3_folder}/x", str(number).encode(), None) for number in range(2)]
    assert put == [True, False]
    content, version = leases.read(f"{s3_folder}/x")
    assert content == b"0"
    assert [leases.put_if(f"{s3_folder}/x", str(number).encode(), version) for number in range(2, 4)] == [True, False]
    assert leases.read(f"{s3_folder}/x")[0] == b"2"


def test_nothing_is_left_behind_and_no_listing_shows_the_lease(s3_folder: str) -> None:
    with one_writer(s3_folder):
        assert leases.read(f"{s3_folder}/.writer.json")[1] is not None
        assert storage.list_files(s3_folder) == []
    assert leases.read(f"{s3_folder}/.writer.json") == (b"", None)


def test_a_holder_that_was_taken_for_dead_ends_and_says_who_writes_there_now(s3_folder: str) -> None:
    other = b'{"process": 7, "host": "other", "since": "now", "run": "y"}'
    taking_over = threading.Timer(0.3, storage.publish_bytes, (f"{s3_folder}/.writer.json", other))
    told = "taken for dead, and process 7 on other since now writes"
    taking_over.start()
    with pytest.raises(PipelineError, match=told), one_writer(s3_folder):
        time.sleep(20)
    assert b"other" in storage.read_bytes(f"{s3_folder}/.writer.json"), "it is not ours to remove"


def test_a_server_that_is_away_for_a_while_costs_no_lease(s3_proxy: Proxy, s3_folder: str) -> None:
    with one_writer(s3_folder):
        before = leases.read(f"{s3_folder}/.writer.json")
        s3_proxy.faults = [Fault("status", 503, 4, path="writer")]
        while s3_proxy.faults[0].times:
            time.sleep(0.05)
        end = time.monotonic() + 10
        while leases.read(f"{s3_folder}/.writer.json") == before:
            assert time.monotonic() < end
            time.sleep(0.1)
