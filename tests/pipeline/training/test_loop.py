import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_learner import TinyLearner

from pipeline.batches.join import JoinedDataset, TrainingBatch
from pipeline.batches.sampling import EpochSampler
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.training.loop import StepReport, Trainer, TrainingConfig
from pipeline.training.optimizing import AverageConfig, OptimizerConfig

SETTINGS = TrainingConfig(data="unused", run="unused", batch_size=4, learning_rate=0.3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> JoinedDataset:
    folder = make_dataset(tmp_path_factory.mktemp("data"), clips=12, broken=(3,))
    return JoinedDataset(read_manifest(folder), sample_rate_hz=8000, seconds=0.5)


class Bench:
    """A trainer and its batches."""

    def __init__(
        self,
        clips: JoinedDataset,
        settings: TrainingConfig = SETTINGS,
        nan_at: int = -1,
        learner: TinyLearner | None = None,
    ) -> None:
        self.sampler = EpochSampler(weights=np.ones(12), batch_size=settings.batch_size)
        self.trainer = Trainer(
            learner or TinyLearner(nan_at), settings, self.sampler, self.schedule, torch.device("cpu")
        )
        self._clips = clips

    @staticmethod
    def schedule(epoch: int) -> float:
        return 1.0 if epoch == 0 else 0.5

    def run(self, steps: int) -> list[StepReport]:
        batches = (self._clips[rows] for rows in self.sampler.batches(self.trainer.step))
        return list(islice(self.trainer.steps(batches), steps))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.trainer.trained_model.state_dict().items()}


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, some: bool = False) -> None:
    assert some or ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_restored_trainer_goes_on_bit_for_bit(clips: JoinedDataset, stop: int, average: str) -> None:
    kind = AverageConfig(kind=average, decay=0.5, start_epoch=0, every_epochs=1)  # pyright: ignore[reportArgumentType]
    settings = replace(SETTINGS, average=kind)
    straight = Bench(clips, settings)
    reports = straight.run(7)
    first = Bench(clips, settings)
    first.run(stop)
    torch.manual_seed(99)  # whatever happened to the global generator meanwhile
    second = Bench(clips, settings)
    second.trainer.load_state_dict(first.trainer.state_dict())
    assert second.run(7 - stop) == reports[stop:]
    assert_identical(second.weights, straight.weights)


def test_clips_that_could_not_be_decoded_take_no_part(clips: JoinedDataset) -> None:
    assert [report.clips for report in Bench(clips).run(3)].count(3) == 1


def test_learning_rate_grows_with_the_batch_and_follows_the_schedule(clips: JoinedDataset) -> None:
    reports = Bench(clips, replace(SETTINGS, optimizer=OptimizerConfig(reference_batch=8))).run(4)
    assert [report.learning_rate for report in reports] == pytest.approx([0.15, 0.15, 0.15, 0.075])
    assert [report.ends_epoch for report in reports] == [False, False, True, False]


def test_a_loss_that_is_not_finite_stops_before_it_touches_the_weights(clips: JoinedDataset) -> None:
    bench = Bench(clips, nan_at=3)
    bench.run(2)
    before = {key: value for key, value in bench.weights.items() if "network.1" not in key}
    with pytest.raises(FloatingPointError, match="loss is nan"):
        bench.run(1)
    assert bench.trainer.step == 2
    assert_identical({key: bench.weights[key] for key in before}, before)


def test_long_gradients_are_shortened(clips: JoinedDataset) -> None:
    free, bound = Bench(clips), Bench(clips, replace(SETTINGS, optimizer=OptimizerConfig(max_gradient_norm=1e-9)))
    free.run(1)
    bound.run(1)
    start = TinyLearner().model.state_dict()["network.0.weight"]
    # Adam divides by the gradient's size, except where its epsilon of 1e-8 dwarfs it.
    assert (free.weights["network.0.weight"] - start).abs().max() > 0.009
    assert (bound.weights["network.0.weight"] - start).abs().max() < 0.002


class Whitened(TinyLearner):
    """Without batch norm, whose statistics are those of a piece."""

    def __init__(self) -> None:
        super().__init__()
        self.model.network[1] = torch.nn.Identity()


@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_taken_in_pieces_gives_the_same_step(clips: JoinedDataset, pieces: int) -> None:
    whole, parted = (
        Bench(clips, replace(SETTINGS, batch_size=6, accumulate=count), learner=Whitened()) for count in (1, pieces)
    )
    for ours, theirs in zip(parted.run(4), whole.run(4), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
        assert ours.clips == theirs.clips


def test_too_many_micro_batches_are_refused(clips: JoinedDataset) -> None:
    with pytest.raises(UsageError, match="too small for 1 ranks x 3 micro-batches"):
        Bench(clips, replace(SETTINGS, accumulate=3))


class Loud(TinyLearner):
    """Makes every gradient as large as `factor` says, while its loss keeps its value."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def loss(self, network: torch.nn.Module, batch: TrainingBatch, generator: torch.Generator) -> torch.Tensor:
        loss = super().loss(network, batch, generator)
        return loss + self.factor * (loss - loss.detach())


def test_float16_skips_steps_whose_scaled_gradient_overflows_and_goes_on(clips: JoinedDataset) -> None:
    half = replace(SETTINGS, precision="float16")
    bench = Bench(clips, half, learner=Loud(300))
    before = bench.weights
    first = bench.run(1)[0]
    assert first.skipped
    assert math.isfinite(first.loss)
    assert_identical({key: bench.weights[key] for key in before if "network.0" in key}, before, some=True)
    reports = [first, *bench.run(9)]
    assert bench.trainer.skipped_steps == sum(report.skipped for report in reports)
    assert not reports[-1].skipped
    restored = Bench(clips, half, learner=Loud(300))
    restored.trainer.load_state_dict(copy.deepcopy(bench.trainer.state_dict()))
    assert restored.trainer.skipped_steps == bench.trainer.skipped_steps
    assert restored.run(2) == bench.run(2)
    assert_identical(restored.weights, bench.weights)


def test_the_state_of_an_earlier_version_goes_on(clips: JoinedDataset) -> None:
    bench, later = Bench(clips, SETTINGS), Bench(clips, SETTINGS)
    bench.run(3)
    bench.trainer.skipped_steps = 2
    state = copy.deepcopy(bench.trainer.state_dict())
    state["left_out"] = state.pop("skipped_steps")
    later.trainer.load_state_dict(state)
    assert later.trainer.skipped_steps == 2
    assert later.run(2) == bench.run(2)


def test_float16_gradients_that_overflow_at_any_scale_are_divergence(clips: JoinedDataset) -> None:
    bench = Bench(clips, replace(SETTINGS, precision="float16"), learner=Loud(math.inf))
    with pytest.raises(FloatingPointError):
        bench.run(40)


def test_a_loss_that_is_no_number_stops_float16_at_once(clips: JoinedDataset) -> None:
    bench = Bench(clips, replace(SETTINGS, precision="float16"), nan_at=2)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        bench.run(3)
    assert bench.trainer.step == 1


def test_a_compiled_network_learns_the_same_within_rounding(
    clips: JoinedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of torch.compile but its last step, whose C++ compiler takes minutes on a busy machine.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    exact, compiled = Bench(clips).run(3), Bench(clips, replace(SETTINGS, compile=True)).run(3)
    assert [report.loss for report in compiled] == pytest.approx([report.loss for report in exact], rel=1e-4)


def test_a_machine_without_a_compiler_says_so_at_once(clips: JoinedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> Callable:
        def run(*values: object) -> None:
            raise RuntimeError("No working C++ compiler found\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"--compile: .*No working C\+\+ compiler found"):
        Bench(clips, replace(SETTINGS, compile=True))


def test_running_mean_keeps_its_share_and_plain_mean_is_plain(clips: JoinedDataset) -> None:
    def average_after_each_step(kind: AverageConfig) -> list[torch.Tensor]:
        bench = Bench(clips, replace(SETTINGS, average=kind))
        return [bench.weights["network.0.weight"] for _ in range(6) if bench.run(1)]

    last = average_after_each_step(AverageConfig())
    ema = average_after_each_step(AverageConfig(kind="ema", decay=0.75))
    torch.testing.assert_close(ema[1], 0.75 * last[0] + 0.25 * last[1])
    swa = average_after_each_step(AverageConfig(kind="swa", start_epoch=0, every_epochs=1))
    assert torch.equal(swa[1], last[1])  # no epoch has ended yet
    torch.testing.assert_close(swa[5], (last[2] + last[5]) / 2)


def test_bfloat16_and_channels_last_learn_the_same_within_their_rounding(clips: JoinedDataset) -> None:
    exact = Bench(clips).run(3)
    rounded = Bench(clips, replace(SETTINGS, precision="bfloat16", channels_last=True)).run(3)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=0.05)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"learning_rate": 0.0}, {"max_failed": 1.5}, {"seed": -1}, {"keep_checkpoints": 0}],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TrainingConfig(data="d", run="r", **wrong)
