import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import teacher
from pipeline.audio import load_waveform
from pipeline.errors import CheckpointError, PipelineError
from pipeline.logit_store import LogitPart, LogitStore, open_store, write_stamp
from pipeline.manifest import Manifest
from pipeline.stages.shard_labeller import LabellerConfig, ShardLabeller, ShardReport
from pipeline.stages.teacher_spec import TeacherSpec, stamp_teachers

SHARD, STEM = "tiny-000000.tar", "tiny-000000"


@pytest.fixture
def clips(make_noises: Callable) -> list:
    return make_noises(5, 5)


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., LabellerConfig]:
    def make(manifest: Manifest, *teachers: str, **settings: object) -> LabellerConfig:
        specs = tuple(map(TeacherSpec.parse, teachers))
        stamp = stamp_teachers(specs, manifest, "float32")
        store = str(tmp_path / "store")
        write_stamp(store, stamp)
        config = LabellerConfig(data=manifest.location, store=store, teachers=specs, stamp=stamp, batch_size=2)
        return replace(config, **settings)

    return make


def label(config: LabellerConfig, shard: str = SHARD) -> tuple[ShardReport, LogitStore, LogitPart]:
    labeller = ShardLabeller(config)
    report = labeller.label_shard(shard)
    labeller.close()
    store = open_store(config.store)
    [part] = [part for part in store.parts if f"{part.stem}.tar" == shard]
    return report, store, part


def test_part_holds_the_weighted_mean_of_the_teachers_logits(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    specs = [make_teacher("passt_tiny") + "@3", make_teacher("ast_tiny")]
    report, store, part = label(configure(manifest, *specs))

    expected = np.zeros((len(clips), 5))
    for name, share in (("passt_tiny", 0.75), ("ast_tiny", 0.25)):
        path = next(spec for spec in specs if spec.startswith(name)).split("=")[1].split("@")[0]
        model = teacher.create_model(name, path).eval()
        for row, (_, _, audio) in enumerate(clips):
            waveform = load_waveform(audio, sample_rate_hz=model.sample_rate_hz, seconds=model.input_seconds)
            with torch.inference_mode():
                logits = model(model.front_end(torch.from_numpy(waveform)[None]))  # (1, classes)
            expected[row] += share * logits[0].numpy()
    np.testing.assert_allclose(store.part_logits(part), expected, atol=4e-3)  # float16 steps of 2 to 4 are 0.002
    assert store.clip_ids().to_pylist() == [clip_id for clip_id, _, _ in clips]
    assert (report.clips, report.failed) == (5, 0)
    assert 0 < report.waiting_seconds < report.seconds


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (5, 3), (64, 2)])
def test_batches_and_threads_change_no_logit(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, batch_size: int, threads: int
) -> None:
    manifest = build_dataset("data", clips)
    spec = make_teacher("passt_tiny")
    _, store, part = label(configure(manifest, spec))
    before = store.part_logits(part)
    _, store, part = label(configure(manifest, spec, batch_size=batch_size, decode_threads=threads))
    np.testing.assert_allclose(store.part_logits(part), before, atol=4e-3)


def test_same_shard_gives_the_same_bytes(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    path = Path(config.store) / f"{STEM}.parquet"
    label(config)
    before = path.read_bytes()
    label(config)
    assert path.read_bytes() == before


def test_clip_that_is_no_audio_fails_alone(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    clips[1] = ("essay", (0,), b"To be, or not to be")
    report, store, part = label(configure(build_dataset("data", clips), make_teacher("passt_tiny")))
    assert store.clip_ids().to_pylist() == [clip_id for clip_id, _, _ in clips if clip_id != "essay"]
    assert [(failure.clip_id, failure.reason) for failure in part.failures] == [("essay", "not audio")]
    assert (report.clips, report.failed) == (5, 1)


def test_clip_whose_bytes_changed_fails_alone(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    tar = Path(manifest.location) / SHARD
    content = bytearray(tar.read_bytes())
    content[manifest.offsets[3] + 100] ^= 1
    tar.write_bytes(content)
    _, store, part = label(configure(manifest, make_teacher("passt_tiny")))
    assert store.clip_count == 4
    assert [(failure.clip_id, failure.reason) for failure in part.failures] == [(clips[3][0], "shard unreadable")]
    assert "not those that the manifest was made from" in part.failures[0].detail


def _spoil_one_class(value: float) -> Callable[[nn.Module], object]:
    return lambda network: network.get_submodule("head.1").get_parameter("bias")[2].fill_(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_logits_that_float16_cannot_hold_are_failures(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, value: float
) -> None:
    manifest = build_dataset("data", clips)
    spec = make_teacher("passt_tiny", change=_spoil_one_class(value))
    report, store, part = label(configure(manifest, spec))
    assert store.clip_count == 0
    assert {failure.reason for failure in part.failures} == {"non-finite logits"}
    assert report.failed == len(clips)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_near_float32(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, precision: str
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    _, store, part = label(config)
    exact = store.part_logits(part)
    stamp = replace(config.stamp, precision=precision)
    write_stamp(config.store, stamp)
    _, store, part = label(replace(config, stamp=stamp))
    found = store.part_logits(part)
    assert not np.array_equal(found, exact), "the networks ran in float32"
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_progress_counts_every_clip_of_the_shard_once(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    clips[4] = ("essay", (0,), b"To be, or not to be")
    labeller = ShardLabeller(configure(build_dataset("data", clips), make_teacher("passt_tiny")))
    told: list[int] = []
    labeller.label_shard(SHARD, told.append)
    labeller.close()
    assert told == [2, 4, 5]


def _refuse_batches_above(monkeypatch: pytest.MonkeyPatch, clips: int) -> None:
    """Let a teacher run out of memory as a GPU does."""
    forward = teacher.AudioTransformer.forward

    def small_forward(self: teacher.AudioTransformer, features: torch.Tensor) -> torch.Tensor:
        if len(features) > clips:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(self, features)

    monkeypatch.setattr(teacher.AudioTransformer, "forward", small_forward)


def test_batches_shrink_to_the_memory(
    build_dataset: Callable,
    clips: list,
    make_teacher: Callable,
    configure: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"), batch_size=5)
    _, store, part = label(config)
    before = store.part_logits(part)
    _refuse_batches_above(monkeypatch, 2)
    report, store, part = label(config)
    assert report.failed == 0
    np.testing.assert_allclose(store.part_logits(part), before, atol=4e-3)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("teacher")] == [
        "5 clips at once are too many for the memory (CUDA out of memory. Tried to allocate 2 GiB.); going on with 2"
    ]


def test_memory_too_small_for_one_clip_ends_with_advice(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    _refuse_batches_above(monkeypatch, 0)
    with pytest.raises(PipelineError, match=r"does not suffice for these teachers and a single clip .* a lower --prec"):
        label(config)
    assert not open_store(config.store).parts


def test_missing_tar_stops_the_shard_before_anything_is_written(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, make_teacher("passt_tiny"))
    (Path(manifest.location) / SHARD).unlink()
    with pytest.raises(PipelineError, match=rf"{SHARD}: no such file"):
        label(config)
    assert not open_store(config.store).parts


def test_other_weights_than_the_stamp_names_are_refused(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    Path(config.teachers[0].checkpoint).write_bytes(Path(make_teacher("passt_tiny", seed=1).split("=")[1]).read_bytes())
    with pytest.raises(CheckpointError, match="Give every machine the same file"):
        ShardLabeller(config)


def test_labeller_needs_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; import pipeline.stages.shard_labeller"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
