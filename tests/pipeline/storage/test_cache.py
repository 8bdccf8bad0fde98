import multiprocessing
import os
import time
import zlib
from pathlib import Path

import pytest
from filelock import FileLock
from object_servers import Proxy

from pipeline.errors import StorageError, UsageError
from pipeline.storage import cache
from pipeline.storage import files as storage
from pipeline.storage.cache import CacheFolder, ShardMirror


def _file(folder: Path, name: str, size: int, age_seconds: float) -> Path:
    path = folder / name
    path.write_bytes(os.urandom(size))
    used = time.time() - age_seconds
    os.utime(path, (used, used))
    return path


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_was_used_least_recently_goes_first_and_other_files_stay(tmp_path: Path) -> None:
    _file(tmp_path, "logits-old.npy", 8192, 3000)
    _file(tmp_path, "logits-old.mask.npz", 4096, 9000)
    _file(tmp_path, "waveforms-older.f32", 8192, 5000)
    _file(tmp_path, "shard-new.tar", 8192, 1)
    _file(tmp_path, "thesis.pdf", 100_000, 90_000)
    _file(tmp_path, ".logits-x.staged-12345678.npy", 4096, 100_000)
    _file(tmp_path, ".logits-y.staged-12345678.npy", 4096, 100)
    cache = CacheFolder(tmp_path, 40_960)
    assert cache.make_room() == 40_960 - 28_672
    assert not (tmp_path / ".logits-x.staged-12345678.npy").exists()
    assert (tmp_path / ".logits-y.staged-12345678.npy").exists()
    cache.make_room(14_000)
    assert _names(tmp_path) == {"logits-old.npy", "logits-old.mask.npz", "shard-new.tar", "thesis.pdf"}
    cache.make_room(30_000)
    assert _names(tmp_path) == {"shard-new.tar", "thesis.pdf"}
    assert cache.make_room(99_999) == 40_960
    assert _names(tmp_path) == {"thesis.pdf"}


def test_a_folder_that_can_t_be_made_is_one_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(StorageError, match=r"home/\.cache: can't be made .* Choose another --cache-dir"):
        CacheFolder(tmp_path / "home/.cache", 10_000).make_room()


def test_files_from_before_the_clock_was_set_back_can_go(tmp_path: Path) -> None:
    _file(tmp_path, "logits-a.npy", 8192, -5000)
    assert CacheFolder(tmp_path, 10_000).make_room(9_000) == 10_000


def test_holes_count_as_nothing(tmp_path: Path) -> None:
    with (tmp_path / "shard-a.tar").open("wb") as stream:
        stream.seek(10_000_000)
        stream.write(bytes(4096))
    assert CacheFolder(tmp_path, 100_000).make_room() > 80_000


def _hold(folder: Path, name: str, held: "multiprocessing.SimpleQueue[bool]", end: float) -> None:
    cache = CacheFolder(folder, 1)
    held.put(cache.hold(folder / name))
    time.sleep(end)


def test_what_a_living_process_holds_stays_until_it_is_dead(tmp_path: Path) -> None:
    for name in ("logits-held.npy", "logits-held.mask.npz", "logits-free.npy"):
        _file(tmp_path, name, 4096, 3000)
    fork = multiprocessing.get_context("fork")
    held = fork.SimpleQueue()
    process = fork.Process(target=_hold, args=(tmp_path, "logits-held.npy", held, 60))
    process.start()
    assert held.get()
    for name in ("logits-held.npy", "logits-held.mask.npz", "logits-free.npy"):
        os.utime(tmp_path / name, (1, 1))
    cache = CacheFolder(tmp_path, 1)
    cache.make_room()
    assert _names(tmp_path) == {"logits-held.npy", "logits-held.mask.npz"}
    process.kill()
    process.join()
    cache.make_room()
    assert _names(tmp_path) == set()
    assert not cache.hold(tmp_path / "logits-held.npy")


def test_what_was_used_just_now_stays_for_whoever_is_about_to_hold_it(tmp_path: Path) -> None:
    _file(tmp_path, "logits-a.npy", 4096, 5)
    cache = CacheFolder(tmp_path, 1)
    cache.make_room()
    assert _names(tmp_path) == {"logits-a.npy"}
    assert not cache.admit(1)


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="above 0"):
        CacheFolder(tmp_path, 0)


def test_a_mirror_gives_back_right_bytes_alone_and_asks_the_server_once(
    s3_proxy: Proxy, s3_folder: str, tmp_path: Path
) -> None:
    content = os.urandom(100_000)
    storage.publish_bytes(storage.join_path(s3_folder, "a.tar"), content)

    def ranges() -> list[storage.StoredRange]:
        places = [(512, 3000), (50_000, 1), (3512, 3000)]
        return [storage.StoredRange("a.tar", o, s, zlib.crc32(content[o : o + s])) for o, s in places]

    cache = CacheFolder(tmp_path, 1e6)
    reader = storage.RangeReader(s3_folder, ShardMirror(cache, s3_folder))
    right = [content[one.offset : one.offset + one.size] for one in ranges()]
    assert reader.read_many(ranges()) == right
    s3_proxy.requests.clear()
    assert reader.read_many(ranges()) == right
    assert s3_proxy.requests == []
    [path] = tmp_path.glob("shard-*")
    damaged = bytearray(path.read_bytes())
    damaged[600] ^= 1
    path.write_bytes(damaged)
    assert reader.read_many(ranges()) == right
    assert len(s3_proxy.requests) == 1
    unknown = storage.StoredRange("a.tar", 512, 3000)  # without a checksum nobody could tell a hole from silence
    s3_proxy.requests.clear()
    assert reader.read_many([unknown, unknown]) == [content[512:3512]] * 2
    assert len(s3_proxy.requests) == 1


def test_a_mirror_larger_than_the_limit_stays_within_it(s3_folder: str, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    for shard in range(4):
        storage.publish_bytes(storage.join_path(s3_folder, f"{shard}.tar"), content)
    cache = CacheFolder(tmp_path, 500_000)
    reader = storage.RangeReader(s3_folder, ShardMirror(cache, s3_folder))
    step = 30_000
    for _ in range(2):
        for shard in range(4):
            for offset in range(0, len(content), step):
                crc32 = zlib.crc32(content[offset : offset + step])
                assert reader.read(f"{shard}.tar", offset, step, crc32) == content[offset : offset + step]
                used = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("shard-*"))
                assert used <= 500_000 + 500_000 // 16 + step


def test_what_the_process_itself_holds_stays_and_locks_of_the_dead_are_cleared_away(tmp_path: Path) -> None:
    _file(tmp_path, "logits-held.npy", 4096, 3000)
    _file(tmp_path, ".logits-gone.in-use-1234", 0, 3000)
    assert CacheFolder(tmp_path, 1).hold(tmp_path / "logits-held.npy")
    os.utime(tmp_path / "logits-held.npy", (1, 1))
    assert CacheFolder(tmp_path, 1).make_room() == 0
    assert (tmp_path / "logits-held.npy").exists()
    assert not (tmp_path / ".logits-gone.in-use-1234").exists()
    assert len(list(tmp_path.glob(".logits-held.in-use-*"))) == 1


def test_a_lock_that_somebody_keeps_for_ever_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.2)
    folder = CacheFolder(tmp_path, 1e9)
    with FileLock(tmp_path / ".prune.lock"), pytest.raises(StorageError, match=r"has been clearing it for 0\.2 s"):
        folder.make_room()
    folder.make_room()
