"""Tagging over time: timelines, events, many sounds, ensembles; and standard input, as it comes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import student
from pipeline.commands.tag import TagConfig, run
from pipeline.dataset.audio import decode
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import TooManyFailuresError, UsageError
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
"""Keywords of a student that sees one frame in 50 ms: as real as any other, and quick."""
STEP_SECONDS = 1.6
"""Of its last maps."""
RATE_HZ = 32_000
Maker = Callable[..., str]


@pytest.fixture
def make_student(tmp_path: Path, five_classes: Vocabulary) -> Maker:
    def make(name: str = "mlp", seed: int = 3, **options: Any) -> str:
        torch.manual_seed(seed)
        model = student.create_model("mn01", num_classes=5, **COARSE, **options)
        metadata = {
            "stage": "student",
            "model": "mn01",
            "kwargs": {**COARSE, **options},
            "classes": 5,
            "vocabulary_sha256": five_classes.sha256,
            "vocabulary": five_classes.to_csv_bytes().decode(),
        }
        save_weights(tmp_path / f"{name}.safetensors", model.state_dict(), metadata)
        return str(tmp_path / f"{name}.safetensors")

    return make


@pytest.fixture
def make_sound(tmp_path: Path) -> Callable[[str, float], str]:
    def make(name: str, seconds: float) -> str:
        random = np.random.default_rng(len(name))
        loudness = np.repeat(random.uniform(0.01, 0.9, round(seconds * 10)), RATE_HZ // 10)
        soundfile.write(tmp_path / name, random.uniform(-1, 1, len(loudness)) * loudness, RATE_HZ)
        return str(tmp_path / name)

    return make


def samples_of(file: str) -> np.ndarray:
    return decode(Path(file).read_bytes()).samples


def probabilities(checkpoint: str, stretch: np.ndarray, **options: Any) -> np.ndarray:
    model = student.create_model("mn01", checkpoint, num_classes=5, **COARSE, **options).eval()
    with torch.inference_mode():
        return model(model.front_end(torch.from_numpy(stretch)[None]))[0].sigmoid().numpy()


def matrix(windows: list[Any]) -> np.ndarray:
    return np.array([[dict(window.tags)[f"Sound {index}"] for index in range(5)] for window in windows])


def test_overlapping_windows_are_averaged_into_a_timeline(make_student: Maker, make_sound: Any) -> None:
    checkpoint, file = make_student(), make_sound("a.wav", 7)
    windows = run(TagConfig((file,), checkpoint=checkpoint, window=3, hop=1, timeline="windows"))
    assert [(one.start_seconds, one.end_seconds) for one in windows] == [(step, step + 1.0) for step in range(7)]
    sound = samples_of(file)
    by_start = [probabilities(checkpoint, sound[RATE_HZ * first :][: 3 * RATE_HZ]) for first in range(5)]
    expected = [np.mean(by_start[max(0, step - 2) : step + 1], axis=0) for step in range(7)]
    np.testing.assert_allclose(matrix(windows), expected, rtol=1e-4)


def test_a_fully_convolutional_student_gives_a_timeline_of_its_own(make_student: Maker, make_sound: Any) -> None:
    options = {"head_type": "fully_convolutional"}
    checkpoint, file = make_student("fc", **options), make_sound("a.wav", 8)
    windows = run(TagConfig((file,), checkpoint=checkpoint, hop=8, window=8))
    assert [one.start_seconds for one in windows] == pytest.approx([step * STEP_SECONDS for step in range(5)])
    logits = np.log(matrix(windows) / (1 - matrix(windows)))
    whole = probabilities(checkpoint, samples_of(file), **options)
    np.testing.assert_allclose(logits.mean(axis=0), np.log(whole / (1 - whole)), rtol=1e-3, atol=1e-4)


def test_other_students_give_one_if_asked_and_transformers_say_that_they_do_not(
    make_student: Maker, make_sound: Any, make_teacher: Maker, tmp_path: Path, five_classes: Vocabulary
) -> None:
    file = make_sound("a.wav", 8)
    for options in ({}, {"head_type": "multihead_attention_pooling"}):
        windows = run(TagConfig((file,), checkpoint=make_student("x", **options), window=8, timeline="frames"))
        assert len(windows) == 5
    (tmp_path / "classes.csv").write_bytes(five_classes.to_csv_bytes())
    spec, classes = make_teacher("ced_tiny"), str(tmp_path / "classes.csv")
    with pytest.raises(UsageError, match="--timeline frames"):
        run(TagConfig((file,), checkpoint=spec, classes=classes, timeline="frames"))


def test_events_say_when_a_class_begins_and_ends(make_student: Maker, make_sound: Any) -> None:
    checkpoint, file = make_student(), make_sound("a.wav", 10)
    steps = matrix(run(TagConfig((file,), checkpoint=checkpoint, window=2, hop=1)))[:, 2]
    onset = float(np.sort(steps)[-3])
    rule: dict[str, Any] = {"events": True, "onset": onset, "offset": onset, "classes": "Sound 2"}
    events = run(TagConfig((file,), checkpoint=checkpoint, window=2, hop=1, **rule))
    heard = steps >= onset
    begins = [step for step in range(10) if heard[step] and (step == 0 or not heard[step - 1])]
    assert [event.start_seconds for event in events] == begins
    assert all(event.tags[0][0] == "Sound 2" for event in events)
    assert sum(event.end_seconds - event.start_seconds for event in events) == heard.sum()


def test_many_sounds_in_folders_and_datasets_are_told_in_order_whatever_the_workers(
    make_student: Maker, make_sound: Any, tmp_path: Path, build_dataset: Callable[..., Manifest], make_noises: Any
) -> None:
    checkpoint = make_student()
    (tmp_path / "rec").mkdir()
    for name, seconds in (("a.wav", 1), ("b.wav", 5), ("c.wav", 2.5)):
        make_sound(f"rec/{name}", seconds)
    (tmp_path / "rec/bad.wav").write_bytes(b"RIFF")
    data = build_dataset("data", make_noises(6, 5)).location
    told = []
    for workers in (0, 2):
        config = TagConfig(
            (str(tmp_path / "rec"), data), checkpoint=checkpoint, window=2, workers=workers, batch_size=3,
            out=str(tmp_path / f"{workers}.csv"),
        )  # fmt: skip
        with pytest.raises(TooManyFailuresError, match=r"1 of 10 files can't be decoded: .*bad\.wav: "):
            run(config)
        told.append((tmp_path / f"{workers}.csv").read_text().splitlines())
    assert told[0] == told[1]
    files = [Path(line.split(",")[0]).name for line in told[0][1::5]]
    assert files == [
        "a.wav",
        "b.wav",
        "b.wav",
        "b.wav",
        "c.wav",
        "c.wav",
        *(f"-clip.{number:02}" for number in range(6)),
    ]


def test_an_ensemble_is_the_mean_of_the_logits(make_student: Maker, make_sound: Any) -> None:
    checkpoints, file = (make_student("one", 1), make_student("two", 2)), make_sound("a.wav", 3)
    (window,) = run(TagConfig((file,), checkpoint=checkpoints))
    each = [probabilities(checkpoint, samples_of(file)) for checkpoint in checkpoints]
    mean = np.mean([np.log(one / (1 - one)) for one in each], axis=0)
    np.testing.assert_allclose(matrix([window])[0], 1 / (1 + np.exp(-mean)), rtol=1e-4)


def test_classes_and_thresholds_choose_what_is_told(make_student: Maker, make_sound: Any, tmp_path: Path) -> None:
    checkpoint, file = make_student(), make_sound("a.wav", 2)
    everything = dict(run(TagConfig((file,), checkpoint=checkpoint))[0].tags)
    (window,) = run(TagConfig((file,), checkpoint=checkpoint, classes=("Sound 1", "/m/3")))
    assert {name for name, _ in window.tags} == {"Sound 1", "Sound 3"}
    high = everything["Sound 1"] + 0.001
    (tmp_path / "t.csv").write_text(f"mid,threshold\n/m/1,{high}\n/m/2,0\n")
    (window,) = run(TagConfig((file,), checkpoint=checkpoint, thresholds=str(tmp_path / "t.csv"), least=0.999))
    assert {name for name, _ in window.tags} == {"Sound 2"}
    with pytest.raises(UsageError, match="Sund 1: no such class; did you mean Sound 1"):
        run(TagConfig((file,), checkpoint=checkpoint, classes="Sund 1"))


def test_a_sound_of_more_than_five_minutes_is_heard_in_windows(make_student: Maker, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(301 * 8000), 8000)
    windows = run(TagConfig((str(tmp_path / "long.wav"),), checkpoint=make_student()))
    assert [one.end_seconds - one.start_seconds for one in windows] == [10] * 30 + [1]


@contextmanager
def tagging_standard_input(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pipeline", "tag", "-", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_lines_come_while_the_stream_lasts_and_a_signal_ends_it_in_one_line(
    make_student: Maker, number: signal.Signals
) -> None:
    flags = ("--rate", "16000", "--window", "1", "--format", "jsonl", "--top", "1")
    with tagging_standard_input("--checkpoint", make_student(), *flags) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(bytes(2 * 16_000 * 2))  # 2 s of silence, then nothing more, and no end
        process.stdin.flush()
        assert b'"start_seconds": 0.0, "end_seconds": 1.0' in process.stdout.readline()
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.write(bytes(2 * 16_000))
        process.stdin.flush()
        assert b'"start_seconds": 1.0' in process.stdout.readline()
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr.read().decode().count("stopped") == 1


def test_a_stream_that_ends_is_told_to_its_end(make_student: Maker, make_sound: Any) -> None:
    file = make_sound("a.wav", 3.5)
    flags = ("--window", "1", "--format", "csv", "--top", "1")
    with tagging_standard_input("--checkpoint", make_student(), *flags) as process:
        output, messages = process.communicate(Path(file).read_bytes(), timeout=60)
    assert process.returncode == 0, messages
    rows = [line.split(",") for line in output.decode().splitlines()]
    assert [(row[0], float(row[1]), float(row[2])) for row in rows[1:]] == [
        ("-", 0, 1), ("-", 1, 2), ("-", 2, 3), ("-", 3, 3.5)
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--rate", "16000")], ids=["WAV", "raw"])
def test_a_stream_of_nothing_ends_in_one_line(make_student: Maker, flags: tuple[str, ...]) -> None:
    with tagging_standard_input("--checkpoint", make_student(), *flags) as process:
        _, messages = process.communicate(b"", timeout=60)
    assert process.returncode == 1
    assert messages.decode().splitlines()[-1].endswith("-: empty stream")
