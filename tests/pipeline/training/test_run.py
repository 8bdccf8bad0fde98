import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_learner import TinyLearner

from pipeline.dataset.manifest import read_manifest, write_manifest
from pipeline.decoding.pool import DecodingPool, RequestQueue
from pipeline.errors import CheckpointError, TooManyFailuresError, TrainingDivergedError, UsageError
from pipeline.runtime.progress import read_metrics
from pipeline.storage.one_writer import one_writer
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import Trainer, TrainingConfig
from pipeline.training.run import RunResult, open_clips, run_training

SPEEDS = ("epoch/clips_per_second", "epoch/data_wait_share")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), clips=16)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainingConfig:
    return settings(data, tmp_path)


def settings(data: Path, folder: Path) -> TrainingConfig:
    return TrainingConfig(
        data=str(data),
        eval_data=str(data),
        run=str(folder / "run"),
        epochs=3,
        batch_size=4,
        learning_rate=0.3,
        workers=0,
        cache=str(folder / "cache"),
        checkpoint_minutes=0,
        keep_checkpoints=100,
        log_every=1,
    )


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps in 3 epochs, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(settings(data, folder)) == RunResult(finished=True, steps=12, best_score=best_map(folder / "run"))
    return folder / "run"


def best_map(run: Path) -> float:
    return max(line["eval/mAP"] for line in read_metrics(run) if "eval/mAP" in line)


def train(config: TrainingConfig, learner: TinyLearner | None = None) -> RunResult:
    manifest, learner = read_manifest(config.data), learner or TinyLearner()
    eval_manifest = read_manifest(config.eval_data) if config.eval_data else None
    return run_training(
        config,
        learner,
        dataset=open_clips(config, manifest, learner.model),
        eval_dataset=open_clips(config, eval_manifest, learner.model) if eval_manifest is not None else None,
        schedule=lambda epoch: 1.0,
    )


def metrics(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in read_metrics(run)]


def weights(run: Path) -> dict[str, bytes | str]:
    """Every bit of both files of weights, and their metadata, by name."""
    found: dict[str, bytes | str] = {}
    for name in ("last", "best"):
        with safe_open(run / f"{name}.safetensors", framework="pt") as stream:
            found |= {f"{name} {key}": stream.get_tensor(key).numpy().tobytes() for key in stream.keys()}  # noqa: SIM118
            found |= {f"{name} {key}": value for key, value in stream.metadata().items()}
    return found


def kill_after(step: int, straight: Path, config: TrainingConfig) -> Path:
    """Make the run folder of a process that was killed after `step` and before the next checkpoint."""
    run = Path(config.run)
    shutil.copytree(straight, run)
    for path in list_checkpoints(run):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    return run


@pytest.mark.parametrize("step", [0, 1, 4, 6, 11])
def test_a_killed_run_resumes_to_the_same_weights_and_the_same_log(
    config: TrainingConfig, straight: Path, step: int
) -> None:
    run = kill_after(step, straight, config)
    assert train(replace(config, resume=True)) == RunResult(finished=True, steps=12, best_score=best_map(straight))
    assert weights(run) == weights(straight)
    assert metrics(run) == metrics(straight)


@pytest.mark.gpu
def test_a_killed_run_resumes_to_the_same_bits_on_a_gpu_too(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, device="cuda", deterministic=True)
    train(replace(config, run=str(tmp_path / "straight")))
    run = kill_after(4, tmp_path / "straight", config)
    train(replace(config, resume=True))
    assert weights(run) == weights(tmp_path / "straight")
    assert metrics(run) == metrics(tmp_path / "straight")


@pytest.mark.gpu
def test_one_rank_on_a_gpu_has_the_loss_curve_of_a_cpu(config: TrainingConfig, straight: Path) -> None:
    train(replace(config, device="cuda", precision="float32"))
    ours, theirs = (
        [line["train/loss"] for line in metrics(run) if "train/loss" in line] for run in (Path(config.run), straight)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_deterministic_run_on_a_cpu_is_the_run_that_it_is_anyway(config: TrainingConfig, straight: Path) -> None:
    try:
        train(replace(config, deterministic=True, checkpoint_minutes=10))
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights(Path(config.run)) == weights(straight)


def test_the_number_of_workers_changes_nothing(config: TrainingConfig, straight: Path) -> None:
    train(replace(config, workers=2, checkpoint_minutes=10))
    assert weights(Path(config.run)) == weights(straight)


def test_kept_audio_makes_one_run_however_much_of_it_is_kept(
    config: TrainingConfig, straight: Path, tmp_path: Path
) -> None:
    config = replace(config, cache_audio=True, checkpoint_minutes=10)
    for name in ("fills", "reads"):
        train(replace(config, run=str(tmp_path / name)))
    train(replace(config, run=str(tmp_path / "part"), cache=str(tmp_path / "small"), cache_size=6e-5))  # 7 of 24 clips
    assert weights(tmp_path / "fills") == weights(tmp_path / "reads") == weights(tmp_path / "part")
    ours, theirs = (
        [line["train/loss"] for line in metrics(run) if "train/loss" in line] for run in (tmp_path / "fills", straight)
    )
    assert ours == pytest.approx(theirs, rel=1e-3), "sound of another rate is rounded to 16 bits, no more"


def test_it_learns_and_says_how_well(config: TrainingConfig, tmp_path: Path) -> None:
    result = train(replace(config, epochs=10, checkpoint_minutes=10))
    lines = [line for line in read_metrics(tmp_path / "run") if "eval/mAP" in line]
    assert len(lines) == 10
    assert result.best_score == max(line["eval/mAP"] for line in lines)
    assert result.best_score
    assert result.best_score > 0.9
    assert lines[-1]["epoch/loss"] < lines[0]["epoch/loss"] / 2
    with safe_open(tmp_path / "run" / "best.safetensors", framework="pt") as stream:
        assert json.loads(stream.metadata()["mAP"]) == result.best_score


def test_a_folder_that_holds_something_is_not_written_over(config: TrainingConfig) -> None:
    Path(config.run).mkdir()
    (Path(config.run) / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        train(config)


class Unlucky(TinyLearner):
    """Gets worse whatever it learns."""

    def score(self, logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray | None = None) -> dict[str, float]:
        return {"mAP": 0.0}


def test_a_folder_that_another_run_writes_is_left_to_it(config: TrainingConfig) -> None:
    with one_writer(config.run):
        for resume in (False, True):
            with pytest.raises(UsageError, match="is being written by process"):
                train(replace(config, resume=resume))
    train(replace(config, epochs=1))
    assert not [path for path in Path(config.run).iterdir() if path.name.startswith(".writer")]


def test_a_finished_run_says_so_and_more_epochs_go_on(
    config: TrainingConfig, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kill_after(12, straight, config)
    with caplog.at_level(logging.INFO):
        assert train(replace(config, resume=True)).finished
    assert "is finished: 3 epochs are done" in caplog.text
    before = weights(Path(config.run))
    more = train(replace(config, epochs=4, resume=True), Unlucky())
    assert (more.steps, more.best_score) == (16, best_map(straight))
    after = weights(Path(config.run))
    assert {key for key in after if after[key] != before[key] and key.startswith("best")} == set()
    assert {key for key in after if after[key] != before[key] and key.startswith("last")}


def test_a_resume_with_other_settings_is_refused(config: TrainingConfig, straight: Path) -> None:
    kill_after(3, straight, config)
    with pytest.raises(UsageError, match=r"batch_size: 4 → 8"):
        train(replace(config, resume=True, batch_size=8))


def test_a_resume_on_other_data_is_refused(
    config: TrainingConfig, straight: Path, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    kill_after(3, straight, config)
    other = make_dataset(tmp_path / "other", clips=20)
    with pytest.raises(CheckpointError, match="other clips or labels"):
        train(replace(config, data=str(other), resume=True))


def test_a_damaged_newest_checkpoint_costs_one_step(
    config: TrainingConfig, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = kill_after(7, straight, config)
    newest = list_checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    train(replace(config, resume=True))
    assert "step-00000007.pt is damaged" in caplog.text
    assert weights(run) == weights(straight)


def test_a_loss_that_is_no_number_names_step_clips_and_checkpoint(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError) as caught:
        train(config, TinyLearner(nan_at=3))
    message = str(caught.value)
    assert message.startswith("step 3: the loss is nan")
    assert "clip" in message
    assert "step-00000002.pt" in message
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000002.pt"


def test_clips_that_fail_are_listed_once_and_too_many_end_the_run(
    config: TrainingConfig, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    data = str(make_dataset(tmp_path / "broken", clips=16, broken=(5, 11)))
    train(replace(config, data=data, max_failed=0.2, checkpoint_minutes=10))
    lines = (tmp_path / "run" / "failed.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["clip_id", "clip5", "clip11"]
    with pytest.raises(TooManyFailuresError, match=r"2 of 16 clips can't be used \(12.5 %\).*limit is 10 %"):
        train(replace(config, data=data, run=str(tmp_path / "other"), max_failed=0.1, checkpoint_minutes=10))
    assert (tmp_path / "other" / "last.safetensors").exists()


def test_clips_to_judge_by_have_to_be_there(
    config: TrainingConfig, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    empty = make_dataset(tmp_path / "empty", clips=8)
    manifest = read_manifest(empty)
    write_manifest(empty, manifest.table.slice(0, 0), manifest.vocabulary)
    with pytest.raises(UsageError, match=r"--eval-data .*empty: holds no clips"):
        train(replace(config, eval_data=str(empty)))
    silent = make_dataset(tmp_path / "silent", clips=8, broken=range(8))
    with pytest.raises(TooManyFailuresError, match=r"silent: 8 of 8 clips can't be used .* nothing is left"):
        train(replace(config, eval_data=str(silent), max_failed=1.0))


@pytest.mark.parametrize("order", [{"sampling": "stream"}, {"read_window": 12}])
def test_other_orders_of_reading_resume_as_exactly(
    config: TrainingConfig, order: dict[str, Any], tmp_path: Path
) -> None:
    whole = replace(config, run=str(tmp_path / "whole"), **order)
    result = train(whole)
    kill_after(5, tmp_path / "whole", config)
    assert train(replace(config, resume=True, workers=2, **order)) == result
    assert weights(Path(config.run)) == weights(tmp_path / "whole")


def test_a_read_window_for_whole_shards_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(UsageError, match="read_window is of no use with --sampling stream"):
        replace(config, sampling="stream", read_window=100)


def test_the_first_clips_to_evaluate_on_are_decoded_while_the_epoch_still_trains(
    config: TrainingConfig, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    readers: list[object] = []
    order, step = DecodingPool.order, Trainer._training_step

    def note_order(pool: DecodingPool, queue: RequestQueue, *given: Any) -> Any:
        if queue.reader not in readers:
            readers.append(queue.reader)  # that of the clips to learn from comes first
        told.append("eval" if readers.index(queue.reader) else "train")
        return order(pool, queue, *given)

    def note_step(trainer: Trainer, *given: Any) -> Any:
        told.append("step")
        return step(trainer, *given)

    monkeypatch.setattr(DecodingPool, "order", note_order)
    monkeypatch.setattr(Trainer, "_training_step", note_step)
    train(replace(config, workers=1, checkpoint_minutes=10, evaluate_every=2))
    ours, theirs = (
        {name: value for name, value in weights(run).items() if name.startswith("last ") and isinstance(value, bytes)}
        for run in (Path(config.run), straight)
    )
    assert ours == theirs
    done = [told[:place].count("step") for place, what in enumerate(told) if what == "eval"]
    assert len(done) == 2 * 4, "16 clips in batches of 4, after the second epoch and the last"
    assert done[:2] == [6, 6], "when the last two steps of the second epoch are all that is left"
    assert done[4:6] == [10, 10]
    assert told.index("step") > 1, "nobody waits for the first batch before it is asked for"
