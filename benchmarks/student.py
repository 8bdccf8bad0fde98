"""Compares a student's speed, waveform to updated weights and waveform to logits, with the usual research script's.

    OMP_NUM_THREADS=2 python -m benchmarks.student

The baseline is the recipe as its authors' script runs it: float32, channels first, eager, power from a real-valued
spectrum, mel filters rebuilt in every step, and torch's own default of Adam. It is the same network with the same
weights. Every way has a process of its own, because how memory is kept is a setting of the process; they take turns,
so that each round compares neighbours in time. Ratios are medians of the rounds' ratios; the one of CPU time is the one
to believe where others use the machine too.

With --data the last way also trains from a dataset, to see how much of the time it waits for clips.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, multiprocessing, nn

import student
from pipeline.batches.join import JoinedDataset, TrainingBatch, batch_loader
from pipeline.batches.sampling import EpochSampler
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.dataset.manifest import read_manifest
from pipeline.models.device import choose_device
from pipeline.runtime.memory import keep_freed_memory
from pipeline.scoring.predictions import predict
from pipeline.training.loop import Trainer
from pipeline.training.student_learner import StudentLearner

SAMPLES, CLASSES, RATE_HZ = 320_000, 527, 32_000
BACKWARD_SHARE = 3
"""A training step costs a forward pass and two products as large, for the gradients of maps and of weights."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train and to run the network."""

    name: str
    precision: Literal["float32", "bfloat16"]
    ours: bool = True
    compiled: bool = False
    channels_last: bool = True


class Runner(Protocol):
    """What a process can be asked to do with a batch."""

    def train(self) -> None: ...
    def infer(self) -> None: ...


def make_batch(clips: int) -> TrainingBatch:
    """Noise, with labels and teacher logits as sparse as real ones."""
    draw = torch.Generator().manual_seed(0)
    return TrainingBatch(
        rows=torch.arange(clips),
        waveforms=0.1 * torch.randn(clips, SAMPLES, generator=draw),
        labels=(torch.rand(clips, CLASSES, generator=draw) < 0.005).float(),
        teacher_logits=3 * torch.randn(clips, CLASSES, generator=draw) - 5,
        has_teacher=torch.ones(clips, dtype=torch.bool),
        valid=torch.ones(clips, dtype=torch.bool),
        positions=torch.arange(clips),
        global_batch_size=clips,
    )


class Upstream:
    """The recipe as a plain script: what the ratios refer to."""

    def __init__(self, model: student.Tagger, batch: TrainingBatch, device: torch.device) -> None:
        self.model, self.device, self.batch = model.to(device), device, batch
        self.optimizer = torch.optim.Adam(model.parameters(), lr=8e-4)
        self.window = torch.hann_window(800, periodic=False, device=device)
        self.emphasis = torch.tensor([[[-0.97, 1.0]]], device=device)
        self.random = np.random.default_rng(0)

    def features(self, waveforms: Tensor, high_hz: float) -> Tensor:
        """(batch, samples) → (batch, 1, mels, frames)."""
        sound = F.conv1d(waveforms[:, None], self.emphasis)[:, 0]  # (batch, samples - 1)
        spectrum = torch.stft(sound, 1024, 320, 800, self.window, center=True, return_complex=True)
        power = torch.view_as_real(spectrum).pow(2).sum(dim=-1)  # (batch, bins, frames)
        bank, _ = torchaudio.compliance.kaldi.get_mel_banks(128, 1024, RATE_HZ, 0.0, high_hz, 100.0, -500.0, 1.0)
        filters = F.pad(bank, (0, 1)).to(self.device)  # (mels, bins)
        return (((filters @ power + 1e-5).log() + 4.5) / 5.0)[:, None]

    def train(self) -> None:
        """Make one step."""
        self.model.train()
        batch = self.batch.to(self.device)
        features = self.features(batch.waveforms, 15_000 + float(self.random.integers(-999, 1000)))
        partner = torch.randperm(len(batch), device=self.device)
        drawn = self.random.beta(0.3, 0.3, len(batch))
        share = torch.tensor(np.maximum(drawn, 1 - drawn), dtype=torch.float32, device=self.device)
        side = share.view(-1, 1, 1, 1)
        logits = self.model(features * side + features[partner] * (1 - side))
        labels = batch.labels * share[:, None] + batch.labels[partner] * (1 - share[:, None])
        teacher = batch.teacher_logits.sigmoid()
        bce = F.binary_cross_entropy_with_logits
        from_teacher = (
            bce(logits, teacher, reduction="none").mean(dim=1) * share
            + bce(logits, teacher[partner], reduction="none").mean(dim=1) * (1 - share)
        ).mean()
        loss = 0.1 * bce(logits, labels) + 0.9 * from_teacher
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()

    @torch.no_grad()
    def infer(self) -> None:
        """Tag the batch."""
        self.model.eval()
        self.model(self.features(self.batch.waveforms.to(self.device), 15_000)).float().cpu()


class Ours:
    """The product's own training loop and prediction."""

    def __init__(self, model: student.Tagger, batch: TrainingBatch, device: torch.device, way: Way) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.batch, self.device, self.way = batch, device, way
        config = TrainStudentConfig(
            data="", run="", batch_size=len(batch), precision=way.precision, channels_last=way.channels_last
        )
        self.sampler = EpochSampler(weights=np.ones(len(batch)), batch_size=len(batch), seed=0)
        self.learner = StudentLearner(model, config.distill, config.mixup, config.augment)
        self.trainer = Trainer(self.learner, config, self.sampler, lambda epoch: 1.0, device)
        self.network: nn.Module | None = None
        if way.compiled:
            model.compile()

    def train(self) -> None:
        """Make one step."""
        self.take([self.batch])

    def take(self, batches: Iterable[TrainingBatch]) -> None:
        """Make a step a batch."""
        for _ in self.trainer.steps(batches):
            pass

    def infer(self) -> None:
        """Tag the batch."""
        if self.network is None:
            self.network = student.fuse(self.learner.model)
            if self.way.compiled:
                self.network.compile()
        predict([self.network], [self.batch], device=self.device, precision=self.way.precision)


def serve(connection: Connection, way: Way, options: argparse.Namespace) -> None:
    """Be one way's process: do what is asked, answer with the seconds and CPU seconds that it took."""
    device = choose_device(options.device)
    torch.manual_seed(0)
    model = student.create_model(options.model)
    batch = make_batch(options.batch)
    runner: Runner = Ours(model, batch, device, way) if way.ours else Upstream(model, batch, device)
    connection.send(None)
    while (job := connection.recv()) is not None:
        what, times = job
        act = getattr(runner, what)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(times):
            act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        connection.send((time.perf_counter() - start, time.process_time() - cpu_start))


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the fastest product of two matrices, in FLOP/s."""
    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def waiting_share(options: argparse.Namespace, way: Way) -> tuple[float, float]:
    """Train from a dataset: clips/s, and the share of the time spent waiting for them."""
    device = choose_device(options.device)
    runner = Ours(student.create_model(options.model), make_batch(options.batch), device, way)
    manifest = read_manifest(options.data)
    if len(manifest.vocabulary) != CLASSES:
        raise SystemExit(f"{options.data}: has {len(manifest.vocabulary)} classes; give a dataset with AudioSet's 527")
    dataset = JoinedDataset(manifest, sample_rate_hz=RATE_HZ, seconds=SAMPLES / RATE_HZ)
    sampler = EpochSampler(weights=np.ones(len(manifest)), batch_size=options.batch, seed=0)
    rows = sampler.batches(0, 4 + options.data_steps)
    loader = iter(batch_loader(dataset, rows, workers=options.workers, device=device))
    waited, began = 0.0, time.perf_counter()
    for step in range(4 + options.data_steps):
        if step == 4:  # the first ones start the workers and warm the kernels up
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        runner.take([batch])
    seconds = time.perf_counter() - began
    return options.data_steps * options.batch / seconds, waited / seconds


Sides = dict[str, Connection]


@contextmanager
def started(ways: list[Way], options: argparse.Namespace) -> Iterator[Sides]:
    """Yields a connection to a process of each way, for as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    sides: Sides = {}
    processes = []
    for way in ways:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, way, options), daemon=True)
        process.start()
        there.close()  # so that a process that dies is noticed here
        sides[way.name] = here
        processes.append(process)
    for connection in sides.values():
        connection.recv()
    yield sides
    for process, connection in zip(processes, sides.values(), strict=True):
        connection.send(None)
        process.join()


def run_rounds(
    sides: Sides, options: argparse.Namespace, what: Literal["train", "infer"]
) -> dict[str, list[tuple[float, float]]]:
    """Let the ways take turns: seconds and CPU seconds a clip of each in every round."""

    def ask(name: str, times: int) -> tuple[float, float]:
        sides[name].send((what, times))
        seconds, cpu_seconds = sides[name].recv()
        return seconds / (times * options.batch), cpu_seconds / (times * options.batch)

    found: dict[str, list[tuple[float, float]]] = {}
    for name in sides:
        print(f"the first batch of {what}, {name}: {ask(name, 1)[0] * options.batch:.1f} s")  # with --compile, minutes
        found[name] = []
    for _ in range(options.repeats):
        for name in sides:
            found[name].append(ask(name, options.steps))
    return found


def show(
    title: str,
    ways: list[Way],
    found: dict[str, list[tuple[float, float]]],
    flops: float,
    peak: Callable[[Way], float],
) -> None:
    """Print a table in Markdown."""
    print(f"\n| {title} | clips/s | spread | x baseline | in CPU time | share of the FLOP limit |")
    print("|---|---:|---:|---:|---:|---:|")
    baseline = np.array(found[ways[0].name])  # (rounds, 2)
    for way in ways:
        costs = np.array(found[way.name])
        wall_ratio, cpu_ratio = np.median(baseline / costs, axis=0)
        slowest, median, fastest = np.quantile(1 / costs[:, 0], (0, 0.5, 1))
        share = 100 * median * flops / peak(way)
        print(
            f"| {way.name} | {median:.1f} | {slowest:.1f} to {fastest:.1f} | {wall_ratio:.2f} | {cpu_ratio:.2f} "
            f"| {share:.0f} % |"
        )


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="mn10", help="registered name of the student")
    parser.add_argument("--batch", type=int, default=16, help="clips of 10 s a step")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too; minutes to start on a CPU")
    parser.add_argument("--layouts", action="store_true", help="train with the channels first, too, and don't infer")
    parser.add_argument("--data", help="a dataset with AudioSet's classes to train from, for the time spent waiting")
    parser.add_argument("--data-steps", type=int, default=30, help="steps that are timed with --data")
    parser.add_argument("--workers", type=int, default=4, help="loader processes with --data, at most one a core")
    options = parser.parse_args()
    device = choose_device(options.device)
    ways = [Way("baseline", "float32", ours=False), Way("ours, float32", "float32"), Way("ours, bfloat16", "bfloat16")]
    if options.compile:
        ways.append(Way("ours, bfloat16, compiled", "bfloat16", compiled=True))
    if options.layouts:
        ways += [replace(way, name=f"{way.name}, channels first", channels_last=False) for way in ways if way.ours]

    flops = 2.0 * student.count_complexity(student.create_model(options.model)).macs
    peaks = {name: matrix_peak(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.model}, batch {options.batch}, {what}, torch {torch.__version__}; {flops / 1e9:.2f} GFLOP forward")
    print(f"matrix products reach {', '.join(f'{peak / 1e9:.0f} GFLOP/s in {name}' for name, peak in peaks.items())}")
    jobs: list[tuple[str, Literal["train", "infer"], int]] = [
        ("training", "train", BACKWARD_SHARE),
        ("inference", "infer", 1),
    ]
    with started(ways, options) as sides:
        for title, act, cost in jobs[:1] if options.layouts else jobs:
            found = run_rounds(sides, options, act)
            show(title, ways, found, cost * flops, lambda way: peaks[way.precision])
    if options.data:
        speed, share = waiting_share(options, ways[-1])
        print(f"\nfrom {options.data}: {speed:.1f} clips/s, {100 * share:.1f} % of the time waiting for data")


if __name__ == "__main__":
    main()
