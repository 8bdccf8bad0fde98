"""What every object store does alike, on real servers of each kind."""

import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import timedelta

import pytest
from azure_blobs import ACCOUNT, ACCOUNT_KEY, CONTAINER, azurite, blob_server
from object_servers import BUCKET, s3_server

from pipeline.errors import PipelineError, StorageError
from pipeline.storage import files as storage
from pipeline.storage.remote import objects, stores

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr(stores, "_stores", {})


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Google's XML interface is S3's but for the signatures."""
    with s3_server(tmp_path_factory.mktemp("google") / "objects", anyone=True) as server:
        yield server.endpoint


@pytest.fixture(scope="session")
def azure() -> Iterator[str]:
    with blob_server() as url:
        yield url


@pytest.fixture(scope="session")
def microsofts() -> Iterator[str]:
    if not shutil.which("azurite-blob"):
        pytest.skip("azurite-blob is not on the PATH: `npm install --global azurite` brings it")
    with azurite() as url:
        yield url


@pytest.fixture(params=["s3", "gs", "az", "az by azurite", "abfss"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    if request.param == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("google"))
        return f"gs://{BUCKET}/{name}"
    url = request.getfixturevalue("microsofts" if request.param.endswith("azurite") else "azure")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
    if request.param == "abfss":
        return f"abfss://{CONTAINER}@{ACCOUNT}.dfs.core.windows.net/{name}"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    return f"az://{CONTAINER}/{name}"


def test_what_is_put_is_read_listed_and_removed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.list_files(folder) == []
    assert not storage.exists(folder)
    names = ["a.bin", "empty", "some name+ü%20.bin", "sub/b.bin", "sub/deeper/c.bin"]
    for name in names:
        storage.publish_bytes(storage.join_path(folder, name), b"" if name == "empty" else CONTENT)
    assert [(file.name, file.size) for file in storage.list_files(folder)] == [
        *(("a.bin", len(CONTENT)), ("empty", 0), ("some name+ü%20.bin", len(CONTENT)))
    ]
    assert storage.list_tree(folder) == sorted(names)
    assert storage.exists(folder)
    assert storage.exists(f"{folder}/sub")
    assert not storage.exists(f"{folder}/su")
    for name in names:
        assert storage.read_bytes(f"{folder}/{name}") == (b"" if name == "empty" else CONTENT)
    monkeypatch.setattr(objects, "PIECE_BYTES", 300_000)
    with storage.local_copy(f"{folder}/sub/b.bin") as path:
        assert path.read_bytes() == CONTENT
    with storage.open_input(f"{folder}/a.bin") as stream:
        stream.seek(-8, os.SEEK_END)
        assert stream.read() == CONTENT[-8:]
    before = storage.list_files(folder)[0].version
    storage.publish_bytes(f"{folder}/a.bin", b"other")
    assert storage.list_files(folder)[0].version != before
    for location in (f"{folder}/a.bin", f"{folder}/a.bin", f"{folder}/sub", f"{folder}/sub"):
        storage.remove(location)
    assert storage.list_tree(folder) == ["empty", "some name+ü%20.bin"]
    storage.remove(folder)
    assert not storage.exists(folder)


def test_ranges_are_read_side_by_side_and_end_where_the_file_ends(folder: str) -> None:
    storage.publish_bytes(f"{folder}/a.bin", CONTENT)
    wanted = [(5, 10), (100_000, 20), (300_000, 5), (len(CONTENT) - 5, 10), (len(CONTENT) + 200_000, 10), (7, 0)]
    reader = storage.RangeReader(folder)
    found = reader.read_many([storage.StoredRange("a.bin", *one) for one in wanted])
    assert found == [CONTENT[offset : offset + size] for offset, size in wanted]
    [error] = reader.read_many([storage.StoredRange("none.bin", 0, 5)])
    assert str(error) == f"{folder}/none.bin: no such file"


def test_a_large_file_travels_in_parts(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    content = os.urandom(11 << 20)
    storage.publish_bytes(f"{folder}/large.bin", content)
    assert storage.read_bytes(f"{folder}/large.bin") == content
    assert [file.size for file in storage.list_files(folder)] == [len(content)]


def test_a_missing_bucket_and_a_missing_file_are_told_apart(folder: str) -> None:
    with pytest.raises(PipelineError, match="no such file"):
        storage.read_bytes(f"{folder}/none")
    bucket = folder.split("/")[2].partition("@")[0]
    other = folder.replace(bucket, "nobucket", 1)
    for action in (storage.read_bytes, storage.exists, storage.list_files, storage.list_tree, storage.remove):
        with pytest.raises(StorageError, match="there is no bucket 'nobucket'") as caught:
            action(other)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="there is no bucket 'nobucket'"):
        storage.publish_bytes(f"{other}/a", b"")
