import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from fixed_logits import FixedLogits
from made_stores import stamp_for
from safetensors.torch import load_file

import student
from pipeline import cli
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig, run
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import CheckpointError, LogitStoreError, LostProcessError, UsageError
from pipeline.logits.store import open_store, publish_part, write_stamp
from pipeline.models.loading import load_model
from pipeline.runtime.progress import read_metrics
from pipeline.runtime.recipes import to_toml
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import Trainer, TrainingConfig
from pipeline.training.optimizing import AverageConfig
from pipeline.training.run import open_clips
from pipeline.training.student_learner import StudentLearner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), clips=8)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits for the clips 0 to 5, each sure of the class after the labelled one."""
    return make_store(data, tmp_path_factory.mktemp("store"))


def make_store(data: Path, folder: Path, vocabulary_sha256: str = "") -> Path:
    manifest = read_manifest(data)
    stamp = replace(stamp_for(manifest), vocabulary_sha256=vocabulary_sha256 or manifest.vocabulary.sha256)
    logits = 16 * np.roll(manifest.label_matrix(np.arange(6)), 1, axis=1) - 8
    write_stamp(str(folder), stamp)
    publish_part(str(folder), "train-000000", manifest.clip_ids[:6].to_pylist(), logits, stamp, "")
    return folder


def settings(data: Path, store: Path, folder: Path) -> TrainStudentConfig:
    return TrainStudentConfig(
        data=str(data),
        store=str(store),
        eval_data=str(data),
        run=str(folder / "run"),
        cache=str(folder / "cache"),
        model="mn01",
        epochs=3,
        batch_size=4,
        workers=1,
        device="cpu",
        evaluate_every=3,
        checkpoint_minutes=0,
        keep_checkpoints=10,
    )


@pytest.fixture
def config(data: Path, store: Path, tmp_path: Path) -> TrainStudentConfig:
    return settings(data, store, tmp_path)


@pytest.fixture(scope="module")
def straight(data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps in 3 epochs, and what it said."""
    folder = tmp_path_factory.mktemp("straight")
    result = run(settings(data, store, folder))
    assert (result.finished, result.steps, result.best_score is None) == (True, 6, False)
    return folder / "run"


def test_a_student_learns_from_shards_and_logits_to_weights_that_others_load(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    files = {"config.toml", "metrics.jsonl", "tensorboard", "checkpoints", "last.safetensors", "best.safetensors"}
    assert names == files
    for name in ("last", "best"):
        assert student.create_model("mn01", straight / f"{name}.safetensors", num_classes=4).num_classes == 4


def test_clips_without_logits_are_told(config: TrainStudentConfig, caplog: pytest.LogCaptureFixture) -> None:
    run(replace(config, epochs=1, eval_data=None))
    assert "2 of 8 clips have no logits" in caplog.text


def test_pure_distillation_follows_the_teacher_and_the_labels_where_there_is_none(config: TrainStudentConfig) -> None:
    # The teacher of this store contradicts every label, and never saw the last two clips.
    manifest, model = read_manifest(config.data), student.create_model("mn01", num_classes=4)
    logits = open_store(str(config.store)).align(manifest, config.cache)
    batch = open_clips(config, manifest, model, logits)[np.arange(8)]
    as_labelled = 16 * batch.labels - 8
    as_taught = torch.where(batch.has_teacher[:, None], batch.teacher_logits, as_labelled)

    def loss(opinion: torch.Tensor, teacher_weight: float) -> float:
        distill = student.DistillConfig(teacher_weight=teacher_weight)
        learner = StudentLearner(model, distill, student.MixupConfig(alpha=0), student.AugmentConfig())
        return float(learner.loss(FixedLogits(opinion), batch, torch.Generator()))

    assert loss(as_taught, 1.0) < 0.01 < 1 < loss(as_labelled, 1.0)
    assert loss(as_labelled, 0.0) < 0.01 < 1 < loss(as_taught, 0.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_process_ended_by_a_signal_resumes_to_the_same_bits(
    config: TrainStudentConfig, straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ended = replace(config, run=str(tmp_path / "ended"))
    (tmp_path / "recipe.toml").write_text(to_toml(ended))
    command = [sys.executable, "-m", "pipeline", "train-student", "--config", str(tmp_path / "recipe.toml")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list_checkpoints(tmp_path / "ended")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a service manager does: the loader's workers get it too
    said = process.communicate(timeout=60)[1]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name} after step" in said
        assert "all is saved, and --resume goes on" in said
    left = int(list_checkpoints(tmp_path / "ended")[-1].stem.removeprefix("step-"))
    assert left < 6
    assert run(replace(ended, resume=True)).steps == 6
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (tmp_path / "ended", straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_kernels_of_a_dymn_cool_with_the_epochs_and_its_weights_say_how_far(
    config: TrainStudentConfig, tmp_path: Path
) -> None:
    cooling = replace(
        config, model="dymn04", model_options={"width_mult": 0.1}, eval_data=None, workers=0, learning_rate=0.05
    )
    run(replace(cooling, run=str(tmp_path / "straight")))
    ours = load_model(str(tmp_path / "straight" / "last.safetensors"), read_manifest(config.data)).network
    assert isinstance(ours, student.DyMN)
    assert ours.temperature == student.kernel_temperature(2) == 28.0
    resumed = replace(cooling, run=str(tmp_path / "resumed"))
    run(replace(resumed, epochs=2))
    run(replace(resumed, resume=True))
    straight, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("straight", "resumed"))
    assert all(torch.equal(theirs[key], tensor) for key, tensor in straight.items())


@pytest.mark.parametrize("given", ["flags", "recipe"])
def test_a_front_end_of_ones_own_is_trained_kept_with_the_weights_evaluated_and_tagged(
    data: Path, tmp_path: Path, given: str
) -> None:
    settings = {"resample-rate": 16_000, "window-size": 400, "hopsize": 160, "n-fft": 512, "n-mels": 40, "fmin": 60}
    settings |= {"fmax": 7_000, "fmin-aug-range": 1, "fmax-aug-range": 1}
    flags = [f"--model-options.{key}={value}" for key, value in settings.items()]
    if given == "recipe":
        lines = [f"{key.replace('-', '_')} = {value}" for key, value in settings.items()]
        (tmp_path / "recipe.toml").write_text("\n".join(["[model_options]", *lines]))
        flags = ["--config", str(tmp_path / "recipe.toml")]
    command = ["train-student", "--data", str(data), "--eval-data", str(data), "--run", str(tmp_path / "run")]
    command += ["--model", "mn01", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    assert cli.run([*command, "--cache", str(tmp_path / "cache"), *flags]) == 0
    weights = str(tmp_path / "run" / "best.safetensors")
    loaded = load_model(weights)
    assert loaded.sample_rate_hz == 16_000
    assert isinstance(loaded.network, student.Tagger)
    assert loaded.network.front_end.config == student.FrontEndConfig(
        sample_rate_hz=16_000,
        window_samples=400,
        hop_samples=160,
        fft_samples=512,
        mels=40,
        low_hz=60,
        high_hz=7_000,
        low_jitter_hz=1,
        high_jitter_hz=1,
    )
    assert cli.run(["evaluate", "--checkpoint", weights, "--data", str(data), "--workers", "0"]) == 0
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(22_050) / 9), 44_100)
    assert cli.run(["tag", str(tmp_path / "tone.wav"), "--checkpoint", weights]) == 0


def test_an_average_of_a_dymn_is_judged_at_the_epochs_temperature() -> None:
    model = student.create_model("dymn04", num_classes=4, width_mult=0.1)
    learner = StudentLearner(model, student.DistillConfig(), student.MixupConfig(), student.AugmentConfig())
    settings = TrainingConfig(data="d", run="r", batch_size=4, average=AverageConfig(kind="ema"))
    sampler = EpochSampler(weights=np.ones(4), batch_size=4)
    trainer = Trainer(learner, settings, sampler, lambda epoch: 1.0, torch.device("cpu"))
    state = trainer.state_dict()
    state["average"]["n_averaged"] += 1
    trainer.load_state_dict({**state, "step": 7})  # an epoch a step: the seventh was epoch 6
    assert isinstance(trainer.trained_model, student.DyMN)
    assert trainer.trained_model is not model
    assert trainer.trained_model.temperature == model.temperature == 24.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.ray
def test_two_ranks_on_ray_train_have_the_curve_of_one(
    config: TrainStudentConfig, straight: Path, tmp_path: Path
) -> None:
    together = replace(config, run=str(tmp_path / "together"), workers=0, ranks=2)
    result = run(together)
    assert (result.finished, result.steps) == (True, 6)
    ours, theirs = (
        [line["epoch/loss"] for line in read_metrics(folder) if "epoch/loss" in line]
        for folder in (tmp_path / "together", straight)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    with pytest.raises(UsageError, match="is not empty"):  # what a rank raises is what the command raises
        run(together)


@pytest.mark.ray
def test_ranks_on_ray_that_all_stand_still_end_the_command_with_a_word(
    config: TrainStudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runtime.ray_pulse import PulseWatch  # first: it sets what Ray reads while it is imported

    # isort: split
    import ray

    from pipeline.training import ray_ranks

    impatient = lambda board, patience, **more: PulseWatch(board, 5.0, **more)  # noqa: E731
    monkeypatch.setattr(ray_ranks, "PulseWatch", impatient)
    endless = replace(config, run=str(tmp_path / "still"), workers=0, ranks=2, eval_data=None, epochs=10_000)

    def stop_all_ranks() -> None:
        while len(list_checkpoints(tmp_path / "still")) < 2:
            time.sleep(0.1)
        for child in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                child.suspend()

    threading.Thread(target=stop_all_ranks, daemon=True).start()
    try:
        with pytest.raises(LostProcessError, match=r"for 5 s; under way: rank 0, rank 1\. .* with --resume goes on"):
            run(endless)
        assert "Ray Train" not in [thread.name for thread in threading.enumerate()], "it would be there while Ray ends"
    finally:
        ray.shutdown()  # with the ranks, which would take the cores of what comes after


def test_torchrun_passes_a_stop_on_to_all_ranks_and_one_rank_can_go_on(
    config: TrainStudentConfig, straight: Path, tmp_path: Path
) -> None:
    ended = replace(config, run=str(tmp_path / "ended"), workers=0, eval_data=None, epochs=1000)
    (tmp_path / "recipe.toml").write_text(to_toml(ended))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pipeline", "train-student", "--config", str(tmp_path / "recipe.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while len(list_checkpoints(tmp_path / "ended")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert "SIGKILL" not in said  # which torchrun sends 30 s later
    assert "--resume goes on" in said
    left = int(list_checkpoints(tmp_path / "ended")[-1].stem.removeprefix("step-"))
    more = replace(ended, resume=True, epochs=left // 2 + 1)  # two steps an epoch
    assert run(more).steps == 2 * (left // 2 + 1)


def test_a_warm_start_takes_the_weights_and_renews_the_last_layer(
    config: TrainStudentConfig, straight: Path, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    other = make_dataset(tmp_path / "other", clips=8, classes=2)
    start = str(straight / "last.safetensors")
    still = replace(config, data=str(other), eval_data=None, store=None, epochs=1, learning_rate=1e-12)
    run(replace(still, run=str(tmp_path / "warm"), checkpoint=start))
    before, after = load_file(start), load_file(tmp_path / "warm" / "last.safetensors")
    torch.testing.assert_close(after["features.0.0.weight"], before["features.0.0.weight"])
    assert after["classifier.5.weight"].shape[0] == 2


def test_wrong_names_files_and_stores_are_told_before_anything_is_written(
    config: TrainStudentConfig, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--model mn99x"):
        run(replace(config, model="mn99x"))
    with pytest.raises(UsageError, match="no_such_option"):
        run(replace(config, model_options={"no_such_option": 1}))
    with pytest.raises(CheckpointError, match="no such file"):
        run(replace(config, checkpoint=str(tmp_path / "absent.pt")))
    with pytest.raises(LogitStoreError, match="hash"):
        run(replace(config, store=str(make_store(data, tmp_path / "foreign", vocabulary_sha256="f" * 64))))
    with pytest.raises(UsageError, match="batch_size is 64"):
        run(replace(config, batch_size=64))
    assert not (tmp_path / "run").exists()
