import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.commands.teacher_logits import TeacherLogitsConfig, run
from pipeline.dataset.manifest import Manifest, write_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import CheckpointError, PipelineError, TooManyFailuresError, UsageError
from pipeline.labelling.labelling_speed import SPEED_NAME, read_speed
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.store import (
    FAILED_NAME,
    STORE_NAME,
    list_parts,
    open_store,
    write_failures,
    write_stamp,
)
from pipeline.storage.files import LISTING_NAME, list_files, read_bytes

Clips = list[tuple[str, tuple[int, ...], bytes]]
ESSAY = ("essay", (0,), b"To be, or not to be")


@pytest.fixture
def clips(make_noises: Callable[..., Clips]) -> Clips:
    """Three shards of five."""
    return make_noises(15, 5)


def configure(manifest: Manifest, store: Path, *teachers: str, **settings: object) -> TeacherLogitsConfig:
    config = TeacherLogitsConfig(
        data=manifest.location, store=str(store), teacher=teachers, batch_size=2, precision="float32"
    )
    return replace(config, **settings)  # pyright: ignore[reportArgumentType]


def label_without_ray(config: TeacherLogitsConfig, manifest: Manifest, **form: object) -> None:
    """Make the store that `run` makes."""
    specs = tuple(map(TeacherSpec.parse, config.teacher))
    stamp = replace(stamp_teachers(specs, manifest, config.precision), **form)  # pyright: ignore[reportArgumentType]
    write_stamp(config.store, stamp)
    labeller = ShardLabeller(
        LabellerConfig(
            data=config.data, store=config.store, teachers=specs, stamp=stamp, batch_size=config.batch_size or 1
        )
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other numbers of threads sum in other orders, and round otherwise
    for shard in manifest.shards:
        labeller.label_shard(shard)
    torch.set_num_threads(threads)
    labeller.close()
    write_failures(config.store, list_parts(config.store))


def contents(store: Path) -> dict[str, bytes]:
    # The listing for web servers names modification times, and the speed is each run's own.
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name not in (LISTING_NAME, SPEED_NAME)}


def times(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.glob("tiny-*.parquet")}


# With Ray.


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_ray_makes_the_store_that_plain_labelling_makes(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    clips[7] = ESSAY
    manifest = build_dataset("data", clips)
    teachers = (make_teacher("passt_tiny") + "@2", make_teacher("ast_tiny"))
    run(configure(manifest, tmp_path / "store", *teachers, max_failed=0.1, cpus_per_actor=1))
    label_without_ray(configure(manifest, tmp_path / "plain", *teachers), manifest)
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")
    [failed] = pq.read_table(tmp_path / "store" / FAILED_NAME).to_pylist()
    assert (failed["part"], failed["clip_id"], failed["reason"]) == ("tiny-000001", "essay", "not audio")
    noted = read_speed(str(tmp_path / "store"))
    assert noted is not None
    assert noted.clips == len(clips)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_members_and_views_are_those_of_plain_labelling_and_a_rerun_has_nothing_to_do(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    teachers = (make_teacher("passt_tiny") + "@2", make_teacher("ast_tiny"))
    config = configure(manifest, tmp_path / "store", *teachers, keep_members=True, views=2, cpus_per_actor=1)
    run(config)
    views = ViewsStamp(count=2, config=ViewConfig())
    plain = configure(manifest, tmp_path / "plain", *teachers)
    label_without_ray(plain, manifest, members="float16", views=views)
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")
    before = times(tmp_path / "store")
    run(config)
    assert times(tmp_path / "store") == before


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_full_disk_ends_the_run_in_one_line_and_the_rerun_goes_on(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, tmp_path: Path, small_disk: Path
) -> None:
    manifest = build_dataset("data", make_noises(12, 5), clips_per_shard=1)
    config = configure(manifest, small_disk / "store", make_teacher("passt_tiny"))
    filling = small_disk / "filling"
    free = shutil.disk_usage(small_disk).free
    filling.write_bytes(bytes(free - 24 * 1024))  # room for a few parts
    with pytest.raises(PipelineError, match=r"tiny-\d+\.parquet: there is no room left to write it.*same command"):
        run(config)
    done = times(small_disk / "store")
    assert 0 < len(done) < 12
    assert not list((small_disk / "store").glob(".*staged*"))
    filling.unlink()
    run(config)
    after = times(small_disk / "store")
    assert len(after) == 12
    assert {name: after[name] for name in done} == done, "what was done is not done again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system; test_logit_store.py fills one by a limit")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_rerun_does_the_changed_shard_alone(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    before = times(tmp_path / "store")
    clips[6], clips[8] = clips[8], clips[6]
    build_dataset("data", clips)
    run(config)
    after = times(tmp_path / "store")
    assert {name for name in after if after[name] != before[name]} == {"tiny-000001.parquet"}
    assert open_store(config.store).clip_ids().to_pylist() == [clip_id for clip_id, _, _ in clips]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_shard_that_is_gone_does_not_stop_the_others(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    (Path(manifest.location) / "tiny-000001.tar").unlink()
    with pytest.raises(PipelineError, match=r"1 of 3 shards could not be done.*tiny-000001\.tar: no such file"):
        run(configure(manifest, tmp_path / "store", make_teacher("passt_tiny")))
    assert times(tmp_path / "store").keys() == {"tiny-000000.parquet", "tiny-000002.parquet"}


# Killed and begun again, as a program of its own.


def start(config: TeacherLogitsConfig) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "teacher-logits", "--data", config.data, "--store", config.store]
    command += ["--batch-size", str(config.batch_size), "--precision", config.precision, "--cpus-per-actor", "1"]
    command += ["--teacher", *config.teacher]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)


def kill_its_actor(program: int) -> None:
    """Kill the actor that labels shards, as the kernel does when memory runs out."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
    for process in parents:
        ancestor = process
        while ancestor not in (0, program):
            ancestor = parents.get(ancestor, 0)
        if ancestor == program and b"MapWorker" in (Path("/proc") / str(process) / "cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)


@pytest.mark.ray
def test_store_of_killed_runs_equals_an_uninterrupted_one(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, tmp_path: Path
) -> None:
    clips = [*make_noises(72, 5), ESSAY]  # enough shards for a busy machine to notice in time that the first are done
    manifest = build_dataset("data", clips, clips_per_shard=3)
    store = tmp_path / "store"
    config = configure(manifest, store, make_teacher("passt_tiny"), max_failed=0.1, precision="float32")
    label_without_ray(replace(config, store=str(tmp_path / "whole")), manifest)

    for moment in (
        lambda: (store / STORE_NAME).exists(),  # before the first shard
        lambda: times(store) and list(store.glob(".*staged*")),  # while a part is written
    ):
        process = start(config)
        try:
            wait_for(lambda moment=moment: moment() or len(times(store)) >= 4, process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert len(times(store)) < len(manifest.shards)

    process = start(config)
    begun = len(times(store))
    wait_for(lambda: len(times(store)) > begun, process)
    kill_its_actor(process.pid)
    complaint = process.communicate()[1].decode()
    assert process.returncode == 1, complaint
    assert "1 of 73 clips" in complaint, "one bad clip of 73 is more than 1 %"

    assert contents(store) == contents(tmp_path / "whole")


@pytest.mark.ray
def test_ctrl_c_stops_with_a_word_and_nothing_half_written(
    build_dataset: Callable, make_noises: Callable, make_teacher: Callable, tmp_path: Path
) -> None:
    # So many that the rest takes far longer than a signal needs to arrive on a busy machine.
    manifest = build_dataset("data", make_noises(500, 5), clips_per_shard=1)
    store = tmp_path / "store"
    process = start(configure(manifest, store, make_teacher("passt_tiny")))
    wait_for(lambda: times(store), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    complaint = process.communicate()[1].decode()
    assert process.returncode == 130, complaint
    assert "the same command goes on from here" in complaint
    assert contents(store).keys() == {STORE_NAME, *times(store)}


# Without anything left to do, or refused before anything is done.


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where Ray would be started."""
    monkeypatch.setitem(sys.modules, "pipeline.labelling.actor_pool", None)


@pytest.mark.usefixtures("no_ray")
def test_finished_store_is_left_alone(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    leftover = tmp_path / "store" / ".tiny-000000.staged-0123.parquet"
    leftover.write_bytes(b"half")
    before = times(tmp_path / "store")
    run(config)
    assert times(tmp_path / "store") == before
    assert not leftover.exists(), "what a killed writer left behind"


HOLD = """
import sys, time
from pipeline.storage.one_writer import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("place", ["disk", "bucket"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["the same", "other logits"])
def test_a_second_run_on_a_store_is_told_who_writes_there_and_changes_nothing(
    build_dataset: Callable,
    clips: Clips,
    make_teacher: Callable,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    place: str,
    overwrite: bool,
) -> None:
    manifest = build_dataset("data", clips)
    store = str(tmp_path / "store") if place == "disk" else request.getfixturevalue("s3_folder")
    config = replace(configure(manifest, tmp_path, make_teacher("passt_tiny")), store=store)
    label_without_ray(config, manifest)
    before = {file.name: read_bytes(f"{store}/{file.name}") for file in list_files(store)}
    if overwrite:
        config = replace(config, teacher=(make_teacher("ast_tiny"),), overwrite=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, store], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(UsageError, match=f"is being written by process {holder.pid} on .+ since .+ Wait until"):
                run(config)
        finally:
            holder.kill()
    assert {file.name: read_bytes(f"{store}/{file.name}") for file in list_files(store)} == before


@pytest.mark.usefixtures("no_ray")
def test_too_many_failures_end_in_an_error_with_the_store_kept(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    clips[0], clips[7] = ESSAY, ("play", (0,), b"Exit, pursued by a bear")
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    with pytest.raises(
        TooManyFailuresError, match=r"2 of 15 clips.*13\.3 %, limit 1 %\): 2 not audio.*failed\.parquet"
    ):
        run(config)
    assert open_store(config.store).clip_count == 13
    run(replace(config, max_failed=0.14))


def test_a_store_whose_parts_somebody_removed_meanwhile_is_no_success(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_dataset("data", clips)
    monkeypatch.setattr("pipeline.commands.teacher_logits._label", lambda *given: {})  # all went well
    with pytest.raises(PipelineError, match=r"3 of 3 shards were done, but their parts are not in .*tiny-000000"):
        run(configure(manifest, tmp_path / "store", make_teacher("passt_tiny")))


@pytest.mark.usefixtures("no_ray")
def test_failed_clips_are_tried_again_when_asked_for(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    clips[7] = ESSAY
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"), max_failed=1.0)
    label_without_ray(config, manifest)
    run(config)
    with pytest.raises(ImportError, match="actor_pool"):  # there is work
        run(replace(config, redo_failed=True))


@pytest.mark.usefixtures("no_ray")
def test_store_made_otherwise_is_refused_with_the_difference(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    before = contents(tmp_path / "store")
    other = replace(config, teacher=(make_teacher("passt_tiny", seed=1),))
    with pytest.raises(UsageError, match=r"made otherwise \(teacher 1 sha256 is \w{12}, not \w{12}\).*--overwrite"):
        run(other)
    (tmp_path / "store" / STORE_NAME).unlink()  # the parts tell it as well
    with pytest.raises(UsageError, match="made otherwise"):
        run(other)
    del before[STORE_NAME]
    assert contents(tmp_path / "store") == before


@pytest.mark.usefixtures("no_ray")
def test_overwriting_removes_what_was_made_otherwise_first(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    with pytest.raises(ImportError, match="actor_pool"):  # there is work
        run(replace(config, precision="bfloat16", overwrite=True))
    opened = open_store(config.store)
    assert opened.stamp.precision == "bfloat16"
    assert not opened.parts


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_auto_goes_on_in_the_precision_that_the_store_was_begun_with(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path, precision: str
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"), precision=precision)
    label_without_ray(config, manifest)
    before = contents(tmp_path / "store")
    run(replace(config, precision="auto"))
    assert contents(tmp_path / "store") == before


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
def test_auto_begins_a_store_in_the_fastest_precision(
    build_dataset: Callable,
    clips: Clips,
    make_teacher: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fastest: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fastest == "bfloat16"})
    config = configure(build_dataset("data", clips), tmp_path / "store", make_teacher("passt_tiny"), precision="auto")
    with pytest.raises(ImportError, match="actor_pool"):  # there is work
        run(replace(config, gpus_per_actor=0))
    assert open_store(config.store).stamp.precision == fastest


@pytest.mark.usefixtures("no_ray")
def test_auto_asks_the_machines_that_label_not_the_one_that_starts_the_run(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, float | None]] = []
    answers = ModuleType("cluster_precision")
    answers.fastest_on_cluster = lambda address, gpus, patience: asked.append((address, gpus)) or "float16"  # pyright: ignore
    monkeypatch.setitem(sys.modules, "pipeline.labelling.cluster_precision", answers)
    config = configure(build_dataset("data", clips), tmp_path / "store", make_teacher("passt_tiny"), precision="auto")
    for _ in range(2):  # the second time the store says it
        with pytest.raises(ImportError, match="actor_pool"):  # there is work
            run(replace(config, address="10.0.0.1:6379"))
    assert open_store(config.store).stamp.precision == "float16"
    assert asked == [("10.0.0.1:6379", None)]


@pytest.mark.usefixtures("no_ray")
def test_unfit_teacher_is_known_before_ray_starts(build_dataset: Callable, clips: Clips, tmp_path: Path) -> None:
    manifest = build_dataset("data", clips)
    (tmp_path / "weights.safetensors").write_bytes(b"not these")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        run(configure(manifest, tmp_path / "store", f"passt_tiny={tmp_path}/weights.safetensors"))
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("no_ray")
def test_shards_of_one_name_in_two_folders_are_refused(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    table = pa.Table.from_pylist(
        [row | {"shard": f"{number // 8}/same.tar"} for number, row in enumerate(manifest.table.to_pylist())]
    )
    manifest = write_manifest(manifest.location, table, manifest.vocabulary)
    with pytest.raises(UsageError, match=r"0/same\.tar, 1/same\.tar would share the name of a part"):
        run(configure(manifest, tmp_path / "store", make_teacher("passt_tiny")))


@pytest.mark.usefixtures("no_ray")
def test_as_many_largest_logits_as_classes_are_refused(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    with pytest.raises(UsageError, match=r"top_k is 5, but .* has 5 classes"):
        run(configure(manifest, tmp_path / "store", make_teacher("passt_tiny"), top_k=5))


@pytest.mark.usefixtures("no_ray")
def test_store_of_another_form_is_refused_with_the_difference(
    build_dataset: Callable, clips: Clips, make_teacher: Callable, tmp_path: Path
) -> None:
    manifest = build_dataset("data", clips)
    config = configure(manifest, tmp_path / "store", make_teacher("passt_tiny"))
    label_without_ray(config, manifest)
    with pytest.raises(UsageError, match=r"made otherwise \(top_k is none, not 2\)"):
        run(replace(config, top_k=2))
    with pytest.raises(UsageError, match=r"made otherwise \(views is none, not given\)"):
        run(replace(config, views=2))


def test_address_where_nobody_answers_is_refused_at_once() -> None:
    from pipeline.runtime.ray_session import running_ray

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=rf"{address}: no Ray cluster answers there"), running_ray(address):
            pass


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"teacher": ()}, "no teacher"),
        ({"teacher": ("passt_s=",)}, "NAME=CHECKPOINT"),
        ({"store": "data/"}, "folder of its own"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 20, "keep_members": True}, "reweight --top-k"),
        ({"views": 0}, "views is 0; choose 1"),
        ({"batch_size": 0}, "batch_size is 0; choose 1 or more"),
        ({"actors": 0}, "actors is 0"),
        ({"address": "ray://head:10001"}, "ray job submit"),
        ({"gpus_per_actor": -1.0}, "gpus_per_actor is -1"),
        ({"decode_workers": -1}, "decode_workers is -1"),
        ({"max_failed": 1.5}, "max_failed is 1.5; choose a share from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, complaint: str) -> None:
    good = TeacherLogitsConfig(data="data", store="store", teacher=("passt_s=b.pt",))
    with pytest.raises(UsageError, match=complaint):
        replace(good, **settings)
