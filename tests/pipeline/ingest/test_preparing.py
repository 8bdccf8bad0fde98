"""Preparation of clips: what dies or stands still on the way is told with clip and shard, and nothing is lost."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from own_children import decoding_processes
from toy_reader import TellingReader

from pipeline.decoding.pool import DecodingPool
from pipeline.errors import LostProcessError
from pipeline.ingest import ingesting
from pipeline.ingest.checking import SoundChecker
from pipeline.ingest.class_folders import ClassFoldersSource
from pipeline.ingest.ingesting import IngestConfig, ingest
from pipeline.ingest.preparing import ClipPreparation, PreparedSound
from pipeline.ingest.sources import KnownSound, PlannedClip
from pipeline.ingest.transcoding import Transcoding


@pytest.fixture
def source(tmp_path: Path, make_noises: Callable) -> ClassFoldersSource:
    folder = tmp_path / "sounds"
    (folder / "noise").mkdir(parents=True)
    for number, (_, _, audio) in enumerate(make_noises(40, 5)):
        (folder / "noise" / f"{number}.wav").write_bytes(audio)
    return ClassFoldersSource(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def trouble_in_the_second_shard(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[psutil.Process], object]) -> None:
    """Have something happen to the process that decodes, once a few clips of the second shard are done."""
    pack, done = ingesting.pack_shard, [0]

    def hook(*arguments, on_clip: Callable[[], None]) -> None:
        def count() -> None:
            on_clip()
            done[0] += 1
            if done[0] == 22:
                [child] = decoding_processes()
                arguments[3]._queue._pool._patience = 0.5  # from now on: a process may take long to start
                trouble(child)

        pack(*arguments, on_clip=count)

    monkeypatch.setattr(ingesting, "pack_shard", hook)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (psutil.Process.kill, r"was killed \(SIGKILL\)"),
        (psutil.Process.suspend, r"no sign of life for 0.5 s: it is stopped, by SIGSTOP"),
    ],
)
def test_a_lost_process_is_named_with_clip_and_shard_and_a_rerun_goes_on(
    source: ClassFoldersSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable, words: str
) -> None:
    whole = IngestConfig(out=str(tmp_path / "whole" / "data"), clips_per_shard=20, workers=1)
    ingest(whole, source)
    config = IngestConfig(out=str(tmp_path / "data"), clips_per_shard=20, workers=1)
    with monkeypatch.context() as patch:
        trouble_in_the_second_shard(patch, trouble)
        with pytest.raises(LostProcessError) as raised:
            ingest(config, source)
    told = str(raised.value)
    assert re.search(words + r".*; its clip is noise/\d+.wav for data-000001.tar. ", told), told
    assert "\n" not in told
    assert not decoding_processes()
    assert sorted(path.name for path in (tmp_path / "data").glob("*.tar")) == ["data-000000.tar"]
    ingest(config, source)
    assert files(tmp_path / "data") == files(tmp_path / "whole" / "data")


def test_reading_that_stands_still_is_named() -> None:
    reading, writing = os.pipe()
    clips = [(PlannedClip("one", "one.wav", "", ()), lambda: os.read(reading, 1))]
    with pytest.raises(LostProcessError) as raised, ClipPreparation(1, patience=0.5) as preparation:
        list(preparation.prepare("train-000003.tar", clips))
    assert "one.wav for train-000003.tar: nothing has come of it for 0.5 s: it is at" in str(raised.value)
    os.close(writing)


def test_what_is_known_already_needs_no_process() -> None:
    clips = [(PlannedClip("one", "a.tar", "", (), format="wav"), lambda: KnownSound(b"sound", b"{}"))] * 5
    with ClipPreparation(2) as preparation:
        found = [sound for _, sound in preparation.prepare("train-000000.tar", clips)]
        assert not decoding_processes()
    assert [sound.audio for sound in found if isinstance(sound, PreparedSound)] == [b"sound"] * 5


def test_a_process_that_checks_needs_neither_torch_nor_arrow(make_noises: Callable) -> None:
    [(_, _, audio)] = make_noises(1, 5)
    with DecodingPool(1) as pool:
        [modules] = pool.load(TellingReader(SoundChecker(Transcoding("flac"), {})), [(0, audio)])
    assert not modules & {"torch", "pyarrow", "ray"}
