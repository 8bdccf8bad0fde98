import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from object_servers import BUCKET, Fault, Proxy, S3Server

from pipeline.errors import PipelineError, StorageError, StorageUnavailableError, UsageError
from pipeline.storage import files as storage
from pipeline.storage.remote import byte_ranges, calls, objects, stores

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr(stores, "_stores", {})


def test_a_small_file_is_read_with_one_request_and_a_large_one_in_pieces(
    s3_proxy: Proxy, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = storage.join_path(s3_folder, "a.bin")
    storage.publish_bytes(location, CONTENT)
    storage.publish_bytes(storage.join_path(s3_folder, "empty"), b"")
    s3_proxy.requests.clear()
    assert storage.read_bytes(location) == CONTENT
    assert [method for method, _ in s3_proxy.requests] == ["GET"]
    assert storage.read_bytes(storage.join_path(s3_folder, "empty")) == b""
    monkeypatch.setattr(objects, "PIECE_BYTES", 300_000)
    assert storage.read_bytes(location) == CONTENT
    with storage.local_copy(location) as path:
        assert path.name == "a.bin"
        assert path.read_bytes() == CONTENT
    assert not path.exists()


def test_a_remote_file_is_read_in_any_order(s3_folder: str, s3_proxy: Proxy) -> None:
    location = storage.join_path(s3_folder, "a.bin")
    storage.publish_bytes(location, CONTENT)
    for whole in (False, True):
        with storage.open_input(location, whole=whole) as stream:
            stream.seek(-8, os.SEEK_END)
            assert stream.read() == CONTENT[-8:]
            stream.seek(100)
            s3_proxy.faults = [Fault("cut-answer", 10, method="GET")]
            assert stream.read(300) == CONTENT[100:400]
            stream.seek(7, os.SEEK_CUR)
            assert stream.tell() == 407
            assert stream.read(3) == CONTENT[407:410]


def test_near_ranges_share_a_request_and_all_travel_side_by_side(s3_folder: str, s3_proxy: Proxy) -> None:
    for name in ("a.bin", "b.bin"):
        storage.publish_bytes(storage.join_path(s3_folder, name), CONTENT)
    s3_proxy.requests.clear()
    s3_proxy.latency_seconds, s3_proxy.most_at_once, s3_proxy.connections = 0.05, 0, 0
    near = [("a.bin", 5000 * place, 1000) for place in (3, 1, 2, 0)]
    far = [("b.bin", 100_000 * place, 10) for place in range(10)]
    beyond = [("b.bin", len(CONTENT) - 5, 10), ("a.bin", len(CONTENT) + 100_000, 10), ("a.bin", 5, 0)]
    wanted = near + far + beyond
    reader = storage.RangeReader(s3_folder)
    for _ in range(2):
        found = reader.read_many([storage.StoredRange(*one) for one in wanted])
        assert found == [CONTENT[offset : offset + size] for _, offset, size in wanted]
    gets = len(s3_proxy.requests) / 2
    assert gets == 1 + 10 + 2  # the last of the far ones is not near the end
    assert 1 < s3_proxy.most_at_once <= calls.CONCURRENCY
    assert s3_proxy.connections <= calls.CONCURRENCY  # the second time used those of the first


def test_no_more_than_the_stated_number_of_requests_is_under_way(s3_folder: str, s3_proxy: Proxy) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    s3_proxy.latency_seconds, s3_proxy.most_at_once, s3_proxy.gather = 0.02, 0, calls.CONCURRENCY
    ranges = [storage.StoredRange("a.bin", 10_000 * place, 10) for place in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_ranges, "MERGE_GAP_BYTES", 0)
        assert all(isinstance(found, bytes) for found in storage.RangeReader(s3_folder).read_many(ranges))
    assert s3_proxy.most_at_once == calls.CONCURRENCY


@pytest.mark.parametrize(
    "fault",
    [Fault("status", 503, 3), Fault("status", 500, 2), Fault("status", 429, 2), Fault("cut-answer", 100, 3)],
    ids=lambda fault: f"{fault.what}-{fault.value}",
)
def test_a_read_outlives_a_server_that_fails_for_a_while(s3_folder: str, s3_proxy: Proxy, fault: Fault) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    s3_proxy.faults = [fault]
    assert storage.RangeReader(s3_folder).read("a.bin", 10, 1000) == CONTENT[10:1010]
    assert fault.times == 0


@pytest.mark.parametrize("fault", [Fault("status", 503, 2), Fault("cut-upload", 1000, 2)], ids=lambda fault: fault.what)
def test_an_upload_outlives_a_server_that_fails_for_a_while(s3_folder: str, s3_proxy: Proxy, fault: Fault) -> None:
    s3_proxy.faults = [fault]
    fault.method = "PUT"
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    assert fault.times == 0
    assert storage.read_bytes(storage.join_path(s3_folder, "a.bin")) == CONTENT


def test_an_upload_that_is_cut_for_good_leaves_the_old_file_and_nothing_else(
    s3: S3Server, s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_TRIES", 2)
    location = storage.join_path(s3_folder, "a.bin")
    storage.publish_bytes(location, b"old")
    s3_proxy.faults = [Fault("cut-upload", 1000, 1000, method="PUT")]
    for name in ("a.bin", "b.bin"):
        with pytest.raises(StorageUnavailableError, match="2 times in a row"):
            storage.publish_bytes(storage.join_path(s3_folder, name), CONTENT)
    s3_proxy.faults = []
    assert storage.read_bytes(location) == b"old"
    assert [file.name for file in storage.list_files(s3_folder)] == ["a.bin"]
    folder = s3.folder / s3_folder.removeprefix("s3://")
    assert [path.name for path in folder.iterdir()] == ["a.bin"]


def test_a_large_upload_in_parts_is_seen_when_it_is_whole_and_dropped_when_it_fails(
    s3_folder: str, s3_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_TRIES", 2)
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)  # the least that S3 takes
    content = os.urandom(12 << 20)
    location = storage.join_path(s3_folder, "large.bin")
    s3_proxy.faults = [Fault("status", 503, 1000, method="PUT", path="partNumber=3")]
    with pytest.raises(StorageUnavailableError):
        storage.publish_bytes(location, content)
    assert storage.list_files(s3_folder) == []
    assert not storage.exists(location)
    begun = [path for method, path in s3_proxy.requests if method == "POST" and "?uploads" in path]
    dropped = [path for method, path in s3_proxy.requests if method == "DELETE" and "uploadId" in path]
    assert 0 < len(begun) == len(dropped)
    s3_proxy.faults = [Fault("status", 503, 1, method="PUT", path="partNumber=2")]
    storage.publish_bytes(location, content)
    assert storage.read_bytes(location) == content


def test_an_upload_whose_parts_the_server_has_dropped_is_a_failure_of_the_server(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_TRIES", 2)
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    s3_proxy.faults = [Fault("status", 404, 1, method="PUT", path="partNumber=2")]
    with pytest.raises(
        StorageUnavailableError, match=r"large\.bin: the server dropped the upload before its last part"
    ):
        storage.publish_bytes(storage.join_path(s3_folder, "large.bin"), bytes(12 << 20))


def test_a_listing_shows_what_others_published_since(s3_folder: str) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), b"one")
    before = storage.list_files(s3_folder)
    other = multiprocessing.get_context("spawn").Process(
        target=storage.publish_bytes, args=(storage.join_path(s3_folder, "b.bin"), b"other")
    )
    other.start()
    other.join(30)
    assert [file.name for file in storage.list_files(s3_folder)] == ["a.bin", "b.bin"]
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), b"two")
    assert storage.list_files(s3_folder)[0].version != before[0].version
    storage.remove(storage.join_path(s3_folder, "a.bin"))
    storage.remove(storage.join_path(s3_folder, "a.bin"))
    assert [file.name for file in storage.list_files(s3_folder)] == ["b.bin"]
    storage.remove(s3_folder)
    assert storage.list_files(s3_folder) == []


def _read_in_child(
    reader: storage.RangeReader, queue: "multiprocessing.SimpleQueue[object]", environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # a fork server that an earlier test has started has that time's
    try:
        queue.put(reader.read("a.bin", 100, 50))
    except PipelineError as error:
        queue.put(str(error))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_started_processes_make_their_own_connections_and_leave_the_parents_alone(
    s3_folder: str, s3_proxy: Proxy, method: str
) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    reader = storage.RangeReader(s3_folder)
    assert reader.read("a.bin", 0, 10) == CONTENT[:10]  # the parent has a loop, a thread and open connections
    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    stop, background = threading.Event(), []

    def keep_reading() -> None:
        while not stop.is_set():
            background.append(reader.read("a.bin", 20, 10) == CONTENT[20:30])

    thread = threading.Thread(target=keep_reading)
    thread.start()
    children = [context.Process(target=_read_in_child, args=(reader, queue, dict(os.environ))) for _ in range(3)]
    for child in children:
        child.start()
    answers = [queue.get() for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert answers == [CONTENT[100:150]] * 3
    assert background
    assert all(background)
    assert reader.read("a.bin", 0, 10) == CONTENT[:10]


def test_a_process_forked_from_one_that_read_says_so_rather_than_wait_for_ever(s3_folder: str) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=_read_in_child, args=(storage.RangeReader(s3_folder), queue, {}))
    child.start()
    assert "Let processes be started by multiprocessing's 'forkserver' or 'spawn'" in str(queue.get())
    child.join(30)
    assert child.exitcode == 0
    assert storage.read_bytes(f"{s3_folder}/a.bin") == CONTENT


def test_a_server_that_falls_silent_is_asked_again_and_given_up(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish_bytes(f"{s3_folder}/a.bin", CONTENT)
    monkeypatch.setattr(stores, "_SILENCE", timedelta(milliseconds=200))
    monkeypatch.setattr(stores, "_TRIES", 3)
    monkeypatch.setattr(stores, "_stores", {})
    s3_proxy.faults = [fault := Fault("stall", 1, 2, "GET")]
    assert storage.read_bytes(f"{s3_folder}/a.bin") == CONTENT
    assert fault.times == 0
    s3_proxy.faults = [Fault("stall", 1, 100)]
    for action in (storage.read_bytes, storage.list_files, lambda url: storage.publish_bytes(url, CONTENT)):
        with pytest.raises(StorageUnavailableError, match=r"does not answer .* 3 times in a row"):
            action(f"{s3_folder}/a.bin")


def test_a_process_that_waits_for_a_server_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        location = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background, too
        read = f"{listening}; from pipeline.storage import files; files.read_bytes({location!r})"
        with subprocess.Popen([sys.executable, "-c", read], stderr=subprocess.PIPE) as process:
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 1, 130)
    assert b"KeyboardInterrupt" in said


def test_whatever_happens_in_a_request_whoever_waits_for_it_is_told() -> None:
    class Panic(BaseException):
        """As Rust's, which is no Exception."""

    def panic(store: object, path: str) -> None:
        raise Panic("called `unwrap` on a `None` value")

    for _ in range(calls.CONCURRENCY + 1):  # no thread is lost
        with pytest.raises(StorageError, match="memory://x/y: called `unwrap`"):
            calls.call("memory://x/y", panic)


def test_a_disk_without_room_for_what_is_fetched_is_told(s3_folder: str, tmp_path: Path) -> None:
    storage.publish_bytes(f"{s3_folder}/a.bin", CONTENT)
    fetch = "import resource, sys\nfrom pipeline.storage import files\nfrom pipeline.errors import StorageFullError\n"
    fetch += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\ntry:\n"
    fetch += "    files.local_copy(sys.argv[1]).__enter__()\n"
    fetch += "except StorageFullError as error:\n    print(error)\n"
    told = subprocess.run(
        [sys.executable, "-c", fetch, f"{s3_folder}/a.bin"], capture_output=True, text=True, check=True
    )
    assert "a.bin: there is no room left to write it (a file may not grow so large)" in told.stdout


def test_what_can_not_be_is_one_clear_line(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(location: str) -> str:
        with pytest.raises(PipelineError) as caught:
            storage.read_bytes(location)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in said(f"{s3_folder}/none")
    assert "there is no bucket 'nobucket'" in said("s3://nobucket/x")
    for action in (storage.exists, storage.list_files, lambda url: storage.publish_bytes(url, b"")):
        with pytest.raises(StorageError, match="there is no bucket 'nobucket'"):
            action("s3://nobucket/x")
    assert "s3://***@bucket/x: credentials don't belong into a URL" in said("s3://key:secret@bucket/x")
    with pytest.raises(UsageError, match="Protocol not known"):
        storage.read_bytes("nosuch://x/y")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-0123456789")
    assert "permission denied (SignatureDoesNotMatch)" in said(f"{s3_folder}/none")
    with pytest.raises(StorageError, match="permission denied"):
        storage.exists(f"{s3_folder}/none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "can't connect to http://127.0.0.1:9" in said(f"{s3_folder}/none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "nonsense" in said(f"{s3_folder}/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    assert "no credentials" in said(f"{s3_folder}/none")


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "of-a-file")
    with pytest.raises(UsageError, match=r"pip install 'audioset-distill\[s3\]'"):
        storage.read_bytes(f"s3://{BUCKET}/x")
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(UsageError, match="paramiko"):
        storage.read_bytes("sftp://host/x")
