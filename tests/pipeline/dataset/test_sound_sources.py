from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.sound_sources import find_sounds
from pipeline.errors import PipelineError


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    for name in ("rec/b.wav", "rec/a.flac", "rec/day 1/c.MP3", "rec/notes.txt", "rec/.hidden", "[x].wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("rec/b.wav", ["rec/b.wav"]),
        ("rec/notes.txt", ["rec/notes.txt"]),
        ("rec", ["rec/a.flac", "rec/b.wav", "rec/day 1/c.MP3"]),
        ("rec/*", ["rec/a.flac", "rec/b.wav"]),
        ("rec/**/*.MP3", ["rec/day 1/c.MP3"]),
        ("rec/?.*", ["rec/a.flac", "rec/b.wav"]),
        ("[x].wav", ["[x].wav"]),
    ],
)
def test_files_folders_and_patterns_mean_the_sounds_that_they_say(
    recordings: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, found: list[str]
) -> None:
    monkeypatch.chdir(recordings)
    sounds = find_sounds([wanted])
    assert [sounds.name(number) for number in range(len(sounds))] == found
    for number, name in enumerate(found):
        with sounds.open(number) as data:
            assert data == name.encode()


def test_a_dataset_means_its_clips_by_their_ids(
    build_dataset: Callable[..., Manifest], make_noises: Callable[..., Any], recordings: Path
) -> None:
    clips = make_noises(7, 5)
    manifest = build_dataset("data", clips)
    sounds = find_sounds([str(recordings / "rec/b.wav"), manifest.location, str(recordings / "rec/a.flac")])
    assert [sounds.name(number) for number in range(1, 8)] == [clip_id for clip_id, _, _ in clips]
    for number, (_, _, audio) in enumerate(clips, start=1):
        with sounds.open(number) as data:
            assert data == audio
    with sounds.open(8) as data:
        assert data == b"rec/a.flac"


def test_a_url_is_a_file(file_server: Any, recordings: Path) -> None:
    file_server.files["/b.wav"] = b"bytes"
    sounds = find_sounds([file_server.url("/b.wav")])
    with sounds.open(0) as data:
        assert data == b"bytes"


@pytest.mark.parametrize(
    ("wanted", "why"), [("none.wav", "no such file"), ("rec/*.ogg", "no sound fits"), ("empty", "no sounds")]
)
def test_what_means_no_sound_is_refused(
    recordings: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, why: str
) -> None:
    (recordings / "empty").mkdir()
    monkeypatch.chdir(recordings)
    with pytest.raises(PipelineError, match=why):
        find_sounds([wanted])
