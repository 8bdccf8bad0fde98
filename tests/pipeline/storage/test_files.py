import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath
from typing import Self

import pytest

from pipeline.dataset.clip_ids import is_safe_name
from pipeline.errors import PipelineError, StorageError
from pipeline.storage import files as storage


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "local" else f"memory://{tmp_path.name}/data"


def test_what_is_published_is_read_listed_and_removed(folder: str) -> None:
    location = storage.join_path(folder, "a.bin")
    assert not storage.exists(location)
    assert storage.list_files(folder) == []
    storage.publish_bytes(location, b"one")
    storage.publish_bytes(storage.join_path(folder, "sub/b.bin"), b"other")
    assert storage.read_bytes(location) == b"one"
    assert [(file.name, file.size) for file in storage.list_files(folder)] == [("a.bin", 3)]
    assert storage.list_files(folder, ".tar") == []
    storage.remove(location)
    storage.remove(location)
    assert not storage.exists(location)
    storage.remove(folder)
    assert not storage.exists(storage.join_path(folder, "sub/b.bin"))


def test_a_new_file_replaces_the_old_one(folder: str) -> None:
    location = storage.join_path(folder, "a.bin")
    storage.publish_bytes(location, b"one")
    storage.publish_bytes(location, b"two!")
    assert storage.read_bytes(location) == b"two!"
    assert [file.size for file in storage.list_files(folder)] == [4]


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    storage.publish_bytes(tmp_path / "a.bin", b"one")
    before = storage.list_files(tmp_path)[0].version
    time.sleep(0.01)
    storage.publish_bytes(tmp_path / "a.bin", b"two")
    assert storage.list_files(tmp_path)[0].version != before


def test_a_block_that_fails_publishes_nothing(folder: str) -> None:
    location = storage.join_path(folder, "a.bin")
    storage.publish_bytes(location, b"old")

    def fail() -> None:
        with storage.publish(location) as staged:
            staged.write_bytes(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert storage.read_bytes(location) == b"old"
    assert len(storage.list_files(folder)) == 1


def test_a_writer_that_is_killed_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    writer = "import sys, time\nfrom pipeline.storage.files import publish\nwith publish(sys.argv[1]) as staged:\n"
    writer += "    staged.write_bytes(b'half'); print('staged', flush=True); time.sleep(60)\n"
    command = [sys.executable, "-c", writer, str(tmp_path / "a.bin")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1
    assert storage.list_files(tmp_path) == []
    storage.remove_staged(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ranges_are_read_from_many_files(folder: str) -> None:
    for number in range(70):  # more than are kept open
        storage.publish_bytes(storage.join_path(folder, f"{number}.bin"), bytes([number]) * 10)
    reader = storage.RangeReader(folder)
    for _ in range(2):
        assert [reader.read(f"{number}.bin", 3, 4) for number in range(70)] == [bytes([n]) * 4 for n in range(70)]
    assert reader.read("0.bin", 8, 100) == bytes(2)
    with pytest.raises(PipelineError, match="no such file"):
        reader.read("absent.bin", 0, 1)
    assert pickle.loads(pickle.dumps(reader)).read("5.bin", 0, 1) == b"\5"


def test_missing_files_and_folders_in_their_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such file"):
        storage.read_bytes(tmp_path / "absent")
    with pytest.raises(PipelineError, match="is a folder"):
        storage.read_bytes(tmp_path)


def test_urls_and_paths_are_told_apart(tmp_path: Path) -> None:
    assert storage.is_remote("s3://bucket/data")
    of_windows = ("C:data", "C:\\data", "C:/data", "C://data", "d:\\a://b", str(PureWindowsPath("C:/data")), "//host/x")
    for text in (tmp_path, "file:///data", "FILE:///data", "data", "s3:/one", "a b://c", *of_windows):
        assert not storage.is_remote(text), text
    assert storage.local_path(f"FILE://{tmp_path}") == tmp_path
    assert storage.local_path(f"file://{tmp_path}") == tmp_path
    assert storage.join_path("s3://bucket/data/", "a.tar") == "s3://bucket/data/a.tar"
    with pytest.raises(ValueError, match="not a local path"):
        storage.local_path("s3://bucket")


def test_a_tilde_is_a_home_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.local_path("~/x.wav") == tmp_path / "home" / "x.wav"
    assert storage.local_path("~x.wav") == Path("~x.wav")
    assert storage.local_path("~root") != Path("~root")
    (tmp_path / "~root").write_bytes(b"x")
    assert storage.local_path("~root") == Path("~root")


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(PipelineError, match=r"~/x\.wav: this user has no home folder. Set HOME"):
        storage.local_path("~/x.wav")


class WindowsPath(PureWindowsPath):
    def expanduser(self) -> Self:
        return self


def test_paths_of_windows_keep_their_drives_and_are_no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "Path", WindowsPath)
    for text in ("C:\\data", "c:/data", "\\\\server\\share\\data", "data\\eval", "C:data"):
        assert not storage.is_remote(text)
        assert storage.local_path(text) == PureWindowsPath(text)
        shard = storage.join_path(text, "sub/train-000000.tar")
        assert PureWindowsPath(shard) == PureWindowsPath(text) / "sub" / "train-000000.tar"
        assert storage.file_name(shard) == "train-000000.tar"
        assert storage.split_path(shard) == (str(PureWindowsPath(text) / "sub"), "train-000000.tar")
    assert storage.local_path("file:///C:/data") == PureWindowsPath("C:\\data")
    assert storage.split_path("s3://bucket/data/a.tar") == ("s3://bucket/data", "a.tar")


@pytest.mark.parametrize(
    "name", ["a.tar", "sub/a.tar", "..a", "C:a.tar", "C:\\a.tar", "\\a.tar", "..\\a.tar", "a\\..\\b"]
)
def test_a_shards_name_leads_out_of_no_folder_on_windows(name: str) -> None:
    folder = PureWindowsPath("D:\\data")
    joined = folder / name
    assert is_safe_name(name, "\\") == (joined.is_relative_to(folder) and ".." not in joined.parts)


FILL = """
import resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from safetensors.torch import save_file
from pipeline.storage import files as storage
from pipeline.errors import StorageFullError
noise = np.random.default_rng(0).standard_normal(200_000)
writers = {
    "bytes": lambda path: path.write_bytes(noise.tobytes()),
    "numpy": lambda path: np.save(path.with_suffix(".npy"), noise),
    "parquet": lambda path: pq.write_table(pa.table({"x": noise}), path),
    "torch": lambda path: torch.save({"x": torch.from_numpy(noise)}, path),
    "safetensors": lambda path: save_file({"x": torch.from_numpy(noise)}, path),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in writers.items():
    try:
        with storage.publish(f"{sys.argv[1]}/{name}.npy") as staged:
            write(staged)
        print(name, "was written")
    except StorageFullError as error:
        print(error)
try:
    with storage.publish(f"{sys.argv[1]}/other"):
        raise ValueError("no lack of room")
except ValueError as error:
    print(error)
"""


def test_a_disk_without_room_ends_in_one_line_whoever_writes_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout
    for name, line in zip(("bytes", "numpy", "parquet", "torch", "safetensors"), lines, strict=False):
        assert line.startswith(
            f"{tmp_path}/{name}.npy: there is no room left to write it (a file may not grow so large)"
        )
    assert lines[-1] == "no lack of room"
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in ("file", "file/deeper"):
        with pytest.raises(StorageError, match="can't be written"):
            storage.publish_bytes(tmp_path / folder / "a.bin", b"x")
