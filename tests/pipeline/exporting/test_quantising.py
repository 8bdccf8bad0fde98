import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from onnx import numpy_helper

from pipeline.cli import run as run_cli
from pipeline.commands import export
from pipeline.commands.export import ExportConfig, run
from pipeline.commands.tag import TagConfig
from pipeline.commands.tag import run as tag
from pipeline.dataset.manifest import Manifest
from pipeline.errors import CheckpointError, UsageError
from pipeline.exporting.comparing import onnx_runner
from pipeline.exporting.onnx_model import OnnxModel
from pipeline.exporting.quantising import quantise
from pipeline.models.loading import load_model

RATE_HZ = 32_000
Tones = Callable[..., np.ndarray]


@pytest.fixture
def told_by_the_model(tagger: Path, run_folder: Path, build_dataset: Callable[..., Manifest], make_tones: Tones) -> str:
    """A dataset whose labels are what the checkpoint says itself, so that its mAP is 1."""
    sounds = make_tones(10.0)
    logits = OnnxModel(str(tagger)).logits(sounds)
    labels = logits > np.median(logits, axis=0)
    clips = [
        (f"clip{number}", tuple(np.flatnonzero(labels[number]).tolist()), wav_of(sound))
        for number, sound in enumerate(sounds)
    ]
    return build_dataset("labelled", clips, vocabulary=load_model(str(run_folder)).vocabulary).location


def wav_of(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE_HZ, format="wav", subtype="FLOAT")
    return stream.getvalue()


@pytest.fixture
def exported_before(tagger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch's exporter, which takes seconds, the file that it wrote of `run_folder` before."""
    write: Callable[[Any, Any, Path], Any] = lambda exported, metadata, path: shutil.copy(tagger, path)  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "onnx", (write, onnx_runner, ""))


def test_convolutions_and_weights_become_integers_and_the_front_end_stays_as_it_is(
    tagger: Path, tmp_path: Path, make_tones: Tones
) -> None:
    quantise(tagger, tmp_path / "int8.onnx", list(make_tones()))
    before, after = (onnx.load(str(path)).graph for path in (tagger, tmp_path / "int8.onnx"))
    made_by = {name: node.op_type for node in after.node for name in node.output}
    convolutions = [node for node in after.node if node.op_type == "Conv"]
    assert convolutions
    assert {made_by[name] for node in convolutions for name in node.input} == {"DequantizeLinear"}
    floats = {
        one.name: numpy_helper.to_array(one) for one in after.initializer if one.data_type == onnx.TensorProto.FLOAT
    }
    untouched = {one.name: numpy_helper.to_array(one) for one in before.initializer if "front_end" in one.name}
    assert untouched
    assert all(np.array_equal(floats[name], values) for name, values in untouched.items())
    assert max(values.size for name, values in floats.items() if name not in untouched) < 1100  # scales and biases
    weights = [one for one in after.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 4]
    scales = {one.name: one.dims for one in after.initializer}
    assert all(list(scales[f"{one.name.removesuffix('_quantized')}_scale"]) == [one.dims[0]] for one in weights)
    layers = [numpy_helper.to_array(one) for one in after.initializer if one.name.endswith("_int8")]
    assert layers
    assert all((np.abs(rows).max(axis=1) == 127).all() for rows in layers)


def test_all_sounds_say_how_large_maps_become_and_their_order_does_not_matter(
    tagger: Path, tmp_path: Path, make_tones: Tones
) -> None:
    sounds = list(make_tones(0.3))
    for name, inputs in (("there", sounds), ("back", sounds[::-1])):
        quantise(tagger, tmp_path / name, inputs)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "back").read_bytes()


def test_integers_give_nearly_the_same_logits_at_any_length_and_batch(
    tagger: Path, tmp_path: Path, make_tones: Tones
) -> None:
    quantise(tagger, tmp_path / "int8.onnx", list(make_tones(10.0)))
    floats, integers = OnnxModel(str(tagger)), OnnxModel(str(tmp_path / "int8.onnx"))
    for seconds in (2.0, 7.3, 12.0):
        sounds = make_tones(seconds)
        exact, rough = floats.logits(sounds), integers.logits(sounds)
        assert 0 < np.abs(exact - rough).mean() < 0.6 * exact.std(axis=0).mean()  # less than what tells sounds apart
        np.testing.assert_allclose(integers.logits(sounds[:1]), rough[:1], atol=1e-3)


def test_a_file_says_what_its_integers_cost(
    exported_before: None,
    told_by_the_model: str,
    run_folder: Path,
    real_sounds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "int8.onnx"
    flags = ["--int8", "--calibration-data", told_by_the_model, "--check-data", told_by_the_model]
    assert run_cli(["export", str(run_folder), "--out", str(out), *flags, "--max-map-loss", "0.2"]) == 0
    about = OnnxModel(str(out)).metadata.int8
    assert about is not None
    assert (about["map_float"], about["check_clips"], about["calibration_sounds"]) == (1.0, 24, 24)
    assert 0.8 <= about["map_int8"] <= 1
    assert about["calibration_data"] == about["check_data"] == told_by_the_model
    told = " ".join(capsys.readouterr().out.split())
    assert f"24 clips, it has mAP {about['map_int8']:.4f}, the checkpoint 1.0000" in told
    (window,) = tag(TagConfig((str(real_sounds / "1.wav"),), checkpoint=str(out)))
    assert len(window.tags) == 5


def test_more_than_the_allowed_loss_leaves_nothing(
    exported_before: None,
    told_by_the_model: str,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE_HZ), RATE_HZ)  # says nothing of how large maps become
    out = tmp_path / "out" / "int8.onnx"
    flags = ["--int8", "--calibration-data", str(tmp_path / "silence.wav"), "--check-data", told_by_the_model]
    assert run_cli(["export", str(run_folder), "--out", str(out), *flags]) == 1
    told = capsys.readouterr().err
    assert "of mAP (1.0000 before, 0." in told
    assert "0.01 are allowed (--max-map-loss). Nothing was written" in told
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"int8": True}, "--int8 needs --calibration-data"),
        ({"int8": True, "calibration_data": "a"}, "--int8 needs --calibration-data, real sounds, and --check-data"),
        ({"calibration_data": "a"}, "--calibration-data is for --int8"),
        ({"int8": True, "output": "embeddings"}, "whose output is probabilities or logits"),
        ({"int8": True, "out": "mine.pt2"}, "is for .onnx files"),
        ({"calibration_sounds": 0}, "choose 1 or more"),
    ],
)
def test_what_can_not_become_integers_is_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ExportConfig("mn10", **{"out": "mine.onnx", **flags})


def test_a_dataset_of_other_classes_is_refused(
    run_folder: Path, real_sounds: Path, tmp_path: Path, build_dataset: Callable[..., Manifest], make_noises: Any
) -> None:
    other = build_dataset("other", make_noises(3, 5)).location
    flags: dict[str, Any] = {"int8": True, "calibration_data": str(real_sounds), "check_data": other}
    with pytest.raises(CheckpointError, match="was trained for 5 classes"):
        run(ExportConfig(str(run_folder), out=str(tmp_path / "a.onnx"), **flags))
