import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from object_servers import BUCKET, Fault, Proxy, S3Server

from pipeline.errors import PipelineError, StorageError, StorageUnavailableError, UsageError
from pipeline.storage import files as storage
from pipeline.storage.remote import byte_ranges, calls, failures, objects

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIRST_PAUSE_SECONDS", 0.01)


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
    monkeypatch.setattr(failures, "_TRIES", 2)
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
    monkeypatch.setattr(failures, "_TRIES", 2)
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)  # the least that S3 takes
    content = os.urandom(12 << 20)
    location = storage.join_path(s3_folder, "large.bin")
    s3_proxy.faults = [Fault("status", 503, 1000, method="PUT", path="partNumber=3")]
    with pytest.raises(StorageUnavailableError):
        storage.publish_bytes(location, content)
    assert storage.list_files(s3_folder) == []
    assert not storage.exists(location)
    begun = [path for method, path in s3_proxy.requests if method == "POST" and path.endswith("?uploads")]
    dropped = [path for method, path in s3_proxy.requests if method == "DELETE" and "uploadId" in path]
    assert 0 < len(begun) == len(dropped)
    s3_proxy.faults = [Fault("status", 503, 1, method="PUT", path="partNumber=2")]
    storage.publish_bytes(location, content)
    assert storage.read_bytes(location) == content


def test_a_listing_shows_what_others_published_since(s3_folder: str) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), b"one")
    before = storage.list_files(s3_folder)
    other = multiprocessing.get_context("fork").Process(
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


def _read_in_child(folder: str, queue: "multiprocessing.SimpleQueue[object]") -> None:
    started = time.monotonic()
    found = storage.RangeReader(folder).read("a.bin", 100, 50)
    queue.put((found, time.monotonic() - started))


def test_forked_processes_make_their_own_connections_and_leave_the_parents_alone(
    s3_folder: str, s3_proxy: Proxy
) -> None:
    storage.publish_bytes(storage.join_path(s3_folder, "a.bin"), CONTENT)
    reader = storage.RangeReader(s3_folder)
    assert reader.read("a.bin", 0, 10) == CONTENT[:10]  # the parent has a loop, a thread and open connections
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    stop, background = threading.Event(), []

    def keep_reading() -> None:
        while not stop.is_set():
            background.append(reader.read("a.bin", 20, 10) == CONTENT[20:30])

    thread = threading.Thread(target=keep_reading)
    thread.start()
    children = [fork.Process(target=_read_in_child, args=(s3_folder, queue)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [queue.get() for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [found for found, _ in answers] == [CONTENT[100:150]] * 3
    assert background
    assert all(background)
    assert reader.read("a.bin", 0, 10) == CONTENT[:10]


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
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "a-new-connection")
    with pytest.raises(UsageError, match=r"pip install 'audioset-distill\[s3\]'"):
        storage.read_bytes(f"s3://{BUCKET}/x")
