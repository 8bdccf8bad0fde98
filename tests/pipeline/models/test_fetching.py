"""A download ends whole or with one clear error, and what has arrived is not fetched again."""

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_server import Fault, FileServer
from filelock import FileLock

from pipeline.errors import CheckpointError
from pipeline.models import fetching
from pipeline.models.fetching import Patience, download

CONTENT = bytes(range(256)) * 20_000  # 5.1 MB: more than one chunk
HASTE = Patience(tries=2, first_wait_seconds=0.01, silence_seconds=5)


@pytest.fixture
def url(file_server: FileServer) -> str:
    file_server.files["/a/weights.pt"] = CONTENT
    return file_server.url("/a/weights.pt")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pt"


def left_behind(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


def test_a_file_arrives_whole_and_is_not_asked_for_again(file_server: FileServer, url: str, target: Path) -> None:
    download(url, target)
    download(url, target)
    assert target.read_bytes() == CONTENT
    assert len(file_server.asked) == 1
    assert left_behind(target) == ["weights.pt"]


def test_a_cut_connection_is_resumed_where_it_broke(file_server: FileServer, url: str, target: Path) -> None:
    file_server.faults = [Fault(cut_after=3_000_000), Fault(cut_after=1_000_000)]
    download(url, target, patience=HASTE)
    assert target.read_bytes() == CONTENT
    assert [asked.first_byte for asked in file_server.asked] == [0, 3_000_000, 4_000_000]
    assert left_behind(target) == ["weights.pt"]


def test_the_next_call_goes_on_where_an_interrupted_one_stopped(
    file_server: FileServer, url: str, target: Path
) -> None:
    file_server.faults = [Fault(cut_after=3_000_000), Fault(status=503), Fault(status=503)]
    with pytest.raises(CheckpointError, match=r"answered 503 .*3\.0 MB are here and the same command goes on"):
        download(url, target, patience=HASTE)
    assert not target.exists()
    download(url, target, patience=HASTE)
    assert target.read_bytes() == CONTENT
    assert file_server.asked[-1].first_byte == 3_000_000


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(
    file_server: FileServer, url: str, target: Path
) -> None:
    file_server.faults = [Fault(cut_after=3_000_000), Fault(status=503), Fault(status=503)]
    with pytest.raises(CheckpointError):
        download(url, target, patience=HASTE)
    file_server.files["/a/weights.pt"] = newer = CONTENT[::-1]
    download(url, target, patience=HASTE)
    assert target.read_bytes() == newer


def test_a_server_that_sends_another_part_is_not_believed(file_server: FileServer, url: str, target: Path) -> None:
    file_server.faults = [Fault(cut_after=3_000_000), Fault(wrong_start=True)]
    download(url, target, patience=Patience(tries=4, first_wait_seconds=0.01))
    assert target.read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(file_server: FileServer, url: str, target: Path) -> None:
    file_server.faults = [Fault(status=503)]
    download(url, target, patience=HASTE)
    assert target.read_bytes() == CONTENT


def test_a_server_that_promises_more_than_it_has_is_given_up(file_server: FileServer, url: str, target: Path) -> None:
    file_server.faults = [Fault(length_error=5)] * 20
    with pytest.raises(CheckpointError, match=r"weights\.pt: can't be fetched: the (connection broke|server answered)"):
        download(url, target, patience=HASTE)
    assert not target.exists()


def test_a_missing_file_is_told_at_once(file_server: FileServer, target: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pt: can't be fetched: the server answered 404 Not Found\."):
        download(file_server.url("/nothing.pt"), target)
    assert len(file_server.asked) == 1
    assert not target.exists()


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid"])
def test_no_network_is_told_at_once(target: Path, host: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{host} can't be reached .*https_proxy"):
        download(f"http://{host}/weights.pt", target)


def test_what_the_check_refuses_is_deleted(url: str, target: Path) -> None:
    def refuse(path: Path) -> None:
        raise CheckpointError(f"{path.stat().st_size} bytes of nonsense")

    with pytest.raises(CheckpointError, match="what the server sent is no good: 5120000 bytes of nonsense"):
        download(url, target, check=refuse)
    assert left_behind(target) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse to write more than that into a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_what_arrived_is_kept(file_server: FileServer, url: str, target: Path) -> None:
    with largest_file(2_000_000), pytest.raises(CheckpointError, match=r"weights\.pt: can't be written \(File too lar"):
        download(url, target)
    assert not target.exists()
    download(url, target)
    assert target.read_bytes() == CONTENT
    assert file_server.asked[-1].first_byte == 2_000_000


def test_too_small_a_disk_is_told_before_it_is_filled(file_server: FileServer, url: str, target: Path) -> None:
    file_server.faults = [Fault(length_error=10**16)]
    with pytest.raises(CheckpointError, match=r"needs 10000000005\.1 MB, but only [\d.]+ MB are free there"):
        download(url, target)
    assert left_behind(target) == [".weights.pt.partial", ".weights.pt.partial-version"]
    assert (target.parent / ".weights.pt.partial").stat().st_size == 0


def test_a_folder_that_cannot_be_made_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"weights\.pt: can't be written"):
        download(url, tmp_path / "file" / "weights.pt")


def test_processes_that_want_the_same_file_fetch_it_once(file_server: FileServer, url: str, target: Path) -> None:
    script = "import sys; from pathlib import Path; from pipeline.models.fetching import download; "
    script += "download(sys.argv[1], Path(sys.argv[2]))"
    command = [sys.executable, "-c", script, url, str(target)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4, running[0].stderr
    assert target.read_bytes() == CONTENT
    assert len(file_server.asked) == 1
    for process in running:
        process.communicate()


def test_whoever_waits_for_another_process_does_so_as_long_as_that_brings_something(
    url: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE_SECONDS", 1.5)
    target.parent.mkdir()
    partial, started = target.with_name(".weights.pt.partial"), time.monotonic()

    def bring() -> None:
        for _ in range(8):
            with partial.open("ab") as file:
                file.write(b"some")
            time.sleep(0.4)

    other = threading.Thread(target=bring)
    with FileLock(target.with_name(".weights.pt.lock")):
        other.start()
        with pytest.raises(CheckpointError, match=r"is fetching it, but for 1\.5 s it has brought nothing\. End that"):
            download(url, target)
    assert time.monotonic() - started > 8 * 0.4
    other.join(10)
    partial.unlink()
    download(url, target)
    assert target.read_bytes() == CONTENT


def test_a_killed_process_leaves_its_bytes_and_no_lock(file_server: FileServer, url: str, target: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from pipeline.models import fetching; read = fetching._read\n"
        "def die_after_two(response, reads=[]):\n"
        "    reads.append(1)\n"
        "    return read(response) if len(reads) < 3 else os.kill(os.getpid(), 9)\n"
        "fetching._read = die_after_two; fetching.download(sys.argv[1], Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", script, url, str(target)], check=False, timeout=60)
    assert done.returncode == -9
    download(url, target)
    assert target.read_bytes() == CONTENT
    assert file_server.asked[-1].first_byte > 0


def test_a_proxy_of_the_environment_is_asked_instead(
    file_server: FileServer, url: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", file_server.url(""))
    monkeypatch.setenv("no_proxy", "localhost")
    elsewhere = "http://weights.invalid/a/weights.pt"
    download(elsewhere, target)
    assert target.read_bytes() == CONTENT
    assert file_server.asked[0].target == elsewhere
