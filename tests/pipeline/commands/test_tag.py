import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import student
import teacher
from pipeline.commands.tag import TagConfig, TaggedWindow, run
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.errors import TooManyFailuresError, UsageError
from pipeline.training.checkpoints import save_weights

COARSE: dict[str, Any] = {"n_mels": 40, "hopsize": 1600}
"""Keywords of a student that sees one frame in 50 ms: as real as any other, and quick."""
TinyClip = tuple[str, tuple[int, ...], bytes]
RATE_HZ = 32_000


@pytest.fixture
def checkpoint(tmp_path: Path, five_classes: Vocabulary) -> str:
    torch.manual_seed(3)
    model = student.create_model("mn01", num_classes=len(five_classes), **COARSE)
    metadata = {
        "stage": "student",
        "model": "mn01",
        "kwargs": COARSE,
        "classes": len(five_classes),
        "vocabulary_sha256": five_classes.sha256,
        "vocabulary": five_classes.to_csv_bytes().decode(),
    }
    save_weights(tmp_path / "mn01.safetensors", model.state_dict(), metadata)
    return str(tmp_path / "mn01.safetensors")


@pytest.fixture
def classes(tmp_path: Path, five_classes: Vocabulary) -> str:
    (tmp_path / "classes.csv").write_bytes(five_classes.to_csv_bytes())
    return str(tmp_path / "classes.csv")


@pytest.fixture
def make_file(tmp_path: Path, make_noises: Callable[..., list[TinyClip]]) -> Callable[[str, float], str]:
    def make(name: str, seconds: float) -> str:
        (tmp_path / name).write_bytes(make_noises(1, 5, seconds=seconds)[0][2])
        return str(tmp_path / name)

    return make


def test_tags_are_the_models_own_classes_and_probabilities(
    checkpoint: str, make_file: Callable[[str, float], str], five_classes: Vocabulary
) -> None:
    file = make_file("short.wav", 1.5)
    (window,) = run(TagConfig((file,), checkpoint=checkpoint, top=3))
    expected = by_hand(checkpoint, file, 0, 1.5)
    best = np.argsort(-expected)[:3]
    assert [name for name, _ in window.tags] == [five_classes.names[index] for index in best]
    np.testing.assert_allclose([probability for _, probability in window.tags], expected[best], rtol=1e-5)
    assert (window.start_seconds, window.end_seconds) == (0, 1.5)


def test_a_name_that_begins_with_a_tilde_is_a_name(
    checkpoint: str, make_file: Callable[[str, float], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_file("~x.wav", 1.5)
    monkeypatch.chdir(tmp_path)
    (window,) = run(TagConfig(("~x.wav",), checkpoint=checkpoint))
    assert window.file == "~x.wav"


def by_hand(checkpoint: str, file: str, start: float, end: float) -> np.ndarray:
    """(classes,): the probabilities of exactly that stretch of a file, with nothing added."""
    model = student.create_model("mn01", checkpoint, num_classes=5, **COARSE).eval()
    waveform = load_waveform(Path(file).read_bytes(), sample_rate_hz=RATE_HZ, seconds=end)[round(start * RATE_HZ) :]
    with torch.inference_mode():
        return model(model.front_end(torch.from_numpy(waveform)[None]))[0].sigmoid().numpy()


def assert_heard(windows: list[TaggedWindow], stretches: list[tuple[float, float]], checkpoint: str, file: str) -> None:
    assert [(window.start_seconds, window.end_seconds) for window in windows] == stretches
    for window, stretch in zip(windows, stretches, strict=True):
        found = sorted(probability for _, probability in window.tags)
        np.testing.assert_allclose(found, sorted(by_hand(checkpoint, file, *stretch)), rtol=1e-5)


@pytest.mark.parametrize("seconds", [0.3, 1.5, 10, 23])
def test_a_cnn_hears_a_file_as_long_as_it_is(
    checkpoint: str, make_file: Callable[[str, float], str], seconds: float
) -> None:
    file = make_file("whole.wav", seconds)
    assert_heard(run(TagConfig((file,), checkpoint=checkpoint)), [(0, seconds)], checkpoint, file)


def test_windows_are_for_whoever_asks_and_the_last_is_not_filled_up(
    checkpoint: str, make_file: Callable[[str, float], str]
) -> None:
    file = make_file("long.wav", 23)
    windows = run(TagConfig((file,), checkpoint=checkpoint, window=10))
    assert_heard(windows, [(0, 10), (10, 20), (20, 23)], checkpoint, file)
    short = make_file("short.wav", 1.5)
    assert_heard(run(TagConfig((short,), checkpoint=checkpoint, window=10)), [(0, 1.5)], checkpoint, short)


def test_a_sound_too_short_for_one_frame_is_tagged_all_the_same(
    checkpoint: str, make_file: Callable[[str, float], str]
) -> None:
    (window,) = run(TagConfig((make_file("click.wav", 0.005),), checkpoint=checkpoint))
    assert (len(window.tags), window.end_seconds) == (5, 0.005)


def test_gates_over_time_hear_files_in_windows_of_their_length(
    make_file: Callable[[str, float], str], tmp_path: Path, classes: str
) -> None:
    options = {**COARSE, "se_dims": "ct"}
    model = student.create_model("mn01", num_classes=5, **options).eval()
    torch.save(model.state_dict(), tmp_path / "gated.pt")
    file = make_file("long.wav", 12)
    config = TagConfig(
        (file,),
        checkpoint=f"mn01={tmp_path}/gated.pt",
        model_options=options,
        classes=classes,
        top=1,
    )
    windows = run(config)
    assert [(window.start_seconds, window.end_seconds) for window in windows] == [(0, 10), (10, 12)]
    waveform = torch.from_numpy(load_waveform(Path(file).read_bytes(), sample_rate_hz=RATE_HZ, seconds=20))
    with torch.inference_mode():
        expected = model(model.front_end(waveform[None, 320_000:]))[0].sigmoid()
    assert windows[1].tags[0][1] == pytest.approx(float(expected.max()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "stretches"),
    [("ced_tiny", [(0, 12)]), ("ast_tiny", [(0, 10), (10, 12)]), ("passt_tiny", [(0, 10), (10, 12)])],
)
def test_a_transformer_hears_a_file_as_stage_1_hears_a_clip(
    make_file: Callable[[str, float], str],
    make_teacher: Callable[..., str],
    classes: str,
    name: str,
    stretches: list,
) -> None:
    file, spec = make_file("long.wav", 12), make_teacher(name)
    windows = run(TagConfig((file,), checkpoint=spec, classes=classes, top=1))
    assert [(window.start_seconds, window.end_seconds) for window in windows] == stretches
    ensemble = teacher.Ensemble([teacher.create_model(name, spec.partition("=")[2])], [1])
    [rate] = ensemble.sample_rates_hz
    waveform = load_waveform(Path(file).read_bytes(), sample_rate_hz=rate, seconds=12)
    for window, (start, end) in zip(windows, stretches, strict=True):
        sound = torch.from_numpy(waveform[round(start * rate) : round(end * rate)])[None]
        logits = ensemble({rate: sound}, lengths={rate: torch.tensor([sound.shape[1]])})[0, 0]
        assert window.tags[0][1] == pytest.approx(float(logits.sigmoid().max()), rel=1e-4)


def test_json_is_one_object_a_window(
    checkpoint: str, make_file: Callable[[str, float], str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = (make_file("a.wav", 1), make_file("b.wav", 11))
    run(TagConfig(files, checkpoint=checkpoint, window=10, json=True, least=0.2))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.wav", "b.wav", "b.wav"]
    assert all(probability >= 0.2 for line in lines for probability in line["tags"].values())


def test_file_that_is_no_sound_is_named_after_the_others_are_tagged(
    checkpoint: str, make_file: Callable[[str, float], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.mp3").write_text("<html>")
    good = make_file("good.wav", 1)
    config = TagConfig((str(tmp_path / "page.mp3"), good), checkpoint=checkpoint)
    with pytest.raises(TooManyFailuresError, match=r"1 of 2 files.*page\.mp3: not audio"):
        run(config)
    assert good in capsys.readouterr().out.splitlines()  # unbroken, to be copied


def test_values_out_of_range_are_refused(checkpoint: str) -> None:
    with pytest.raises(UsageError, match="nothing to tag"):
        TagConfig((), checkpoint=checkpoint)
    with pytest.raises(UsageError, match="top is 0"):
        TagConfig(("a.wav",), checkpoint=checkpoint, top=0)
    with pytest.raises(UsageError, match="window is 0"):
        TagConfig(("a.wav",), checkpoint=checkpoint, window=0)
