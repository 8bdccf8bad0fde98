import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_children import decoding_processes
from torch import Tensor, nn

import teacher
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp, apply_view, draw_view
from pipeline.errors import CheckpointError, PipelineError
from pipeline.labelling.clip_range import ClipRange, ShardJoin
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller, ShardReport
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.forms import largest, mean_of_members
from pipeline.logits.part_ranges import finished_ranges
from pipeline.logits.store import LogitPart, LogitStore, open_store, write_stamp
from pipeline.models.device import device_name

SHARD, STEM = "tiny-000000.tar", "tiny-000000"
ESSAY = ("essay", (0,), b"To be, or not to be")
SECONDS = 0.2
"""Of the clips of noise."""


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
    with closing(ShardLabeller(config)) as labeller:
        report = labeller.label_shard(shard)
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
            # PaSST is given silence behind a short clip; AST's front end adds zeros to the features.
            seconds = model.input_seconds if name == "passt_tiny" else SECONDS
            waveform = load_waveform(audio, sample_rate_hz=model.sample_rate_hz, seconds=seconds)
            with torch.inference_mode():
                logits = model(model.front_end(torch.from_numpy(waveform)[None]))  # (1, classes)
            expected[row] += share * logits[0].numpy()
    np.testing.assert_allclose(store.part_logits(part), expected, atol=4e-3)  # float16 steps of 2 to 4 are 0.002
    assert store.clip_ids().to_pylist() == [clip_id for clip_id, _, _ in clips]
    assert (report.clips, report.failed) == (5, 0)
    assert 0 < report.waiting_seconds < report.seconds


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (5, 3), (64, 2)])
def test_batches_and_workers_change_no_logit(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, batch_size: int, workers: int
) -> None:
    manifest = build_dataset("data", clips)
    spec = make_teacher("passt_tiny")
    _, store, part = label(configure(manifest, spec))
    before = store.part_logits(part)
    _, store, part = label(configure(manifest, spec, batch_size=batch_size, decode_workers=workers))
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


def _mix_infinities(network: nn.Module) -> object:
    """Give finite weights whose products are infinite, of both signs, so that their sums are no numbers."""
    return network.get_submodule("head.0").get_parameter("weight").fill_(3e38)


@pytest.mark.parametrize(
    "change",
    [_mix_infinities, _spoil_one_class(3e38), _spoil_one_class(70_000.0)],
    ids=["nan", "far beyond float16", "beyond float16"],
)
def test_logits_that_float16_cannot_hold_are_failures(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, change: Callable
) -> None:
    manifest = build_dataset("data", clips)
    spec = make_teacher("passt_tiny", change=change)
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "deviation"), [("float32", 2e-3), ("tf32", 0.02), ("bfloat16", 0.1), ("float16", 0.1)]
)
def test_a_gpu_gives_the_logits_of_float32_on_a_cpu(
    build_dataset: Callable,
    clips: list,
    make_teacher: Callable,
    configure: Callable,
    precision: str,
    deviation: float,
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    _, store, part = label(config)
    exact = store.part_logits(part)
    stamp = replace(config.stamp, precision=precision)
    write_stamp(config.store, stamp)
    _, store, part = label(replace(config, stamp=stamp, device="cuda"))
    np.testing.assert_allclose(store.part_logits(part), exact, atol=deviation)


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


def test_a_clip_too_long_for_the_memory_fails_alone_and_the_others_stay_in_full_batches(
    build_dataset: Callable,
    make_noises: Callable,
    make_teacher: Callable,
    configure: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clips = [*make_noises(3, 5), ("long", (0,), make_noises(1, 5, seconds=22.0)[0][2])]
    config = configure(build_dataset("data", clips), make_teacher("ced_tiny"), batch_size=4)
    forward = teacher.AudioTransformer.encode

    def small_encode(self: teacher.AudioTransformer, grid: Tensor, *given: Any) -> Tensor:
        if grid.shape[0] * grid.shape[-1] > 100:  # patches along time
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(self, grid, *given)

    monkeypatch.setattr(teacher.AudioTransformer, "encode", small_encode)
    labeller = ShardLabeller(config)
    report = labeller.label_shard(SHARD)
    labeller.close()
    assert labeller._ensemble.largest_batch is None
    [part] = open_store(config.store).parts
    assert (report.failed, part.clips) == (1, 3)
    assert [(failure.clip_id, failure.reason) for failure in part.failures] == [("long", "too long for the memory")]
    assert part.failures[0].detail.startswith("22 s (CUDA out of memory")


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


# Other forms.


def ask(spec: str, clips: list, view_of: Callable[[str, np.ndarray, int, int], np.ndarray], **inputs: object) -> Tensor:
    """Returns one teacher's logits, (clips, classes), of each clip as `view_of` makes it."""
    name, path = spec.split("=")
    model = teacher.create_model(name, path).eval()
    rate, samples = model.sample_rate_hz, round(model.input_seconds * model.sample_rate_hz)
    views = [
        view_of(clip_id, load_waveform(audio, sample_rate_hz=rate, seconds=model.input_seconds + 0.125), rate, samples)
        for clip_id, _, audio in clips
    ]
    with torch.inference_mode():
        return model(model.front_end(torch.from_numpy(np.stack(views)), **inputs))


def test_members_are_kept_and_their_mean_is_of_what_is_stored(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    specs = [make_teacher("passt_tiny"), make_teacher("ast_tiny")]
    config = configure(manifest, specs[0] + "@3", specs[1])
    _, store, part = label(config)
    plain = store.part_logits(part)
    config = replace(config, stamp=replace(config.stamp, members="float16"))
    write_stamp(config.store, config.stamp)
    _, store, part = label(config)
    members = store.part_members(part)  # (teachers, clips, classes)
    for spec, found in zip(specs, members, strict=True):
        seconds = 10.0 if spec is specs[0] else SECONDS  # AST's front end adds zeros to the features
        alone = ask(spec, clips, lambda clip_id, waveform, rate, samples, own=seconds: waveform[: round(own * rate)])
        np.testing.assert_allclose(found, alone, atol=4e-3)
    np.testing.assert_array_equal(store.part_logits(part), mean_of_members(members, (3.0, 1.0)))
    np.testing.assert_allclose(store.part_logits(part), plain, atol=8e-3)


def test_member_that_overflows_is_a_failure_although_others_are_finite(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(
        manifest, make_teacher("passt_tiny", change=_spoil_one_class(-70_000.0)), make_teacher("ast_tiny")
    )
    config = replace(config, stamp=replace(config.stamp, members="float16"))
    write_stamp(config.store, config.stamp)
    report, store, part = label(config)
    assert (store.clip_count, report.failed) == (0, len(clips))
    assert {failure.reason for failure in part.failures} == {"non-finite logits"}


def test_largest_logits_are_those_of_the_whole_store(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    _, store, part = label(config)
    whole = store.part_logits(part)
    config = replace(config, stamp=replace(config.stamp, top_k=2))
    write_stamp(config.store, config.stamp)
    _, store, part = label(config)
    top = largest(whole, 2)
    found = store.part_logits(part)
    np.testing.assert_array_equal(np.take_along_axis(found, top.classes.astype(int), 1), top.logits)
    assert [len(set(row)) for row in found.tolist()] == [3] * len(clips), "two logits and the rest"


def test_each_view_is_what_the_teacher_says_of_exactly_that_sound(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    clips[1] = ("essay", (0,), b"To be, or not to be")
    manifest = build_dataset("data", clips)
    spec = make_teacher("passt_tiny", change=lambda network: network.get_classifier().weight.mul_(50))  # it listens
    views = ViewsStamp(count=3, config=ViewConfig(seed=11))
    config = configure(manifest, spec)
    _, store, part = label(config)
    plain = store.part_logits(part)
    config = replace(config, stamp=replace(config.stamp, views=views))
    write_stamp(config.store, config.stamp)
    report, store, part = label(config)
    assert (report.clips, report.failed, store.clip_count) == (5, 1, 4)
    found = store.part_views(part)  # (clips, views, classes)
    good = [clip for clip in clips if clip[0] != "essay"]
    np.testing.assert_allclose(found[:, 0], plain, atol=0.01, err_msg="view 0 is the clip as it is")
    for number in range(3):
        drawn = [draw_view(views.config, clip_id, number) for clip_id, *_ in good]
        by_id = {clip_id: view for (clip_id, *_), view in zip(good, drawn, strict=True)}
        shifts = torch.tensor([(view.low_rise_hz, view.high_rise_hz) for view in drawn])
        expected = ask(
            spec,
            good,
            lambda clip_id, waveform, rate, samples, by_id=by_id: apply_view(
                waveform, by_id[clip_id], sample_rate_hz=rate, samples=samples
            ),
            edge_shifts_hz=shifts,
        )
        np.testing.assert_allclose(found[:, number], expected, atol=0.01)
    spread = np.abs(found[:, 1:] - found[:, :1]).max(axis=(1, 2))
    assert (spread > 0.1).all(), "views of a clip differ"


def test_shard_begun_ahead_gives_the_same_part(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", make_noises(8, 5), clips_per_shard=4)
    config = configure(manifest, make_teacher("passt_tiny"))
    alone = [label(config, shard)[2] for shard in manifest.shards]
    before = [(Path(config.store) / part.file.name).read_bytes() for part in alone]
    labeller = ShardLabeller(config)
    labeller.label_shard(manifest.shards[0], following=manifest.shards[1])
    labeller.label_shard(manifest.shards[1])
    labeller.close()
    assert [(Path(config.store) / part.file.name).read_bytes() for part in alone] == before


FORMS = [{}, {"members": "float16"}, {"top_k": 2}, {"views": ViewsStamp(count=2, config=ViewConfig(seed=3))}]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", FORMS, ids=["plain", "members", "top k", "views"])
def test_a_part_made_in_stretches_has_the_bytes_of_one_made_at_once(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, configure: Callable, form: dict
) -> None:
    clips = make_noises(9, 5)
    clips[1], clips[6] = ESSAY, ("play", (0,), b"Exit, pursued by a bear")
    manifest = build_dataset("data", clips, clips_per_shard=9)
    config = configure(manifest, make_teacher("passt_tiny") + "@2", make_teacher("ast_tiny"))
    config = replace(config, stamp=replace(config.stamp, **form))
    path = Path(config.store) / f"{STEM}.parquet"
    with closing(ShardLabeller(config)) as labeller:
        whole = labeller.label_shard(SHARD)
        expected = path.read_bytes()
        path.unlink()
        looks = iter([False, True])
        last = labeller.label_shard(ClipRange(SHARD, 6))
        first = labeller.label_shard(ClipRange(SHARD, 0, 6), following=ClipRange(SHARD, 6), enough=lambda: next(looks))
        assert [(one.start, one.stop, one.published) for one in (first, last)] == [(0, 4, False), (6, 9, False)]
        middle = labeller.label_shard(ClipRange(SHARD, 4, 6))
        assert not path.exists()
        assert finished_ranges(config.store, config.stamp, manifest) == {SHARD: [(0, 4), (4, 6), (6, 9)]}
        joined = labeller.join_shard(ShardJoin(SHARD, ((0, 4), (4, 6), (6, 9))))
    assert path.read_bytes() == expected
    assert (joined.published, joined.failed) == (True, whole.failed)
    assert whole.failed == first.failed + middle.failed + last.failed == 2
    assert finished_ranges(config.store, config.stamp, manifest) == {}


def test_stretches_of_other_teachers_or_of_another_shard_are_not_taken_for_ours(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, make_teacher("passt_tiny"))
    with closing(ShardLabeller(config)) as labeller:
        labeller.label_shard(ClipRange(SHARD, 0, 2))
    assert finished_ranges(config.store, config.stamp, manifest) == {SHARD: [(0, 2)]}
    assert finished_ranges(config.store, replace(config.stamp, precision="bfloat16"), manifest) == {}
    assert finished_ranges(config.store, config.stamp, build_dataset("data", clips[::-1])) == {}
    with pytest.raises(PipelineError, match="made from something else"), closing(ShardLabeller(config)) as labeller:
        labeller.join_shard(ShardJoin(SHARD, ((0, 2), (2, 5))))
    assert not open_store(config.store).parts


def test_a_store_with_members_says_which_processor_made_a_part(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"))
    assert label(config)[2].devices == ()
    config = replace(config, stamp=replace(config.stamp, members="float16"))
    write_stamp(config.store, config.stamp)
    assert label(config)[2].devices == (device_name("cpu"),)


def test_labeller_needs_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; import pipeline.labelling.shard_labeller"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_processes_that_decode_start_before_the_teachers_load_and_end_where_these_can_not(
    build_dataset: Callable, clips: list, make_teacher: Callable, configure: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(build_dataset("data", clips), make_teacher("passt_tiny"), decode_workers=1)
    teachers = (replace(config.stamp.teachers[0], sha256="0123456789abcdef"),)
    there: list[int] = []
    load = TeacherSpec.load
    monkeypatch.setattr(TeacherSpec, "load", lambda *given: there.append(len(decoding_processes())) or load(*given))
    with pytest.raises(CheckpointError, match="but to 0123456789ab where the run was started"):
        ShardLabeller(replace(config, stamp=replace(config.stamp, teachers=teachers)))
    assert there == [1]
    assert not decoding_processes()
