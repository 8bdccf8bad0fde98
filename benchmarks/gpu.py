"""Measures both stages on a GPU, beside the card's own limits, and prints the tables of docs/results.md.

    python -m benchmarks.gpu [--efficientat CHECKOUT] [--data DATASET] [--out TABLES.md]
    python -m benchmarks.gpu --small          # on any machine, a CPU too, in seconds: shows that it runs

Limits come first: the fastest product and the fastest copy. Then the teachers, stage 1 from shards, without Ray and
through it, the students' steps, the loader, the cache and the evaluation. Clips are ten seconds, Ogg Vorbis at 32 kHz
unless `--data` gives others. EfficientAT's own model and front end run their own step where a checkout is given. Times
are medians of several repeats after some to warm up; the device has finished before a clock is read.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import student
import teacher
from benchmarks.launches import count_calls, training_step
from benchmarks.student import BACKWARD_SHARE, CLASSES, RATE_HZ, SAMPLES, make_batch, matrix_peak
from benchmarks.synthetic import write_dataset
from pipeline.batches.join import MAX_SCORED, JoinedDataset, TrainingBatch, batch_loader, loader_processes
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.commands import train_student
from pipeline.commands.train_student import TrainStudentConfig
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.decoding.pool import DecodingPool
from pipeline.labelling.publisher import Publisher
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.logits.store import write_stamp
from pipeline.models.device import Precision, choose_device, compute_in, tensor_dtype
from pipeline.runtime.cores import limit_threads, usable_cores
from pipeline.runtime.progress import read_metrics
from pipeline.scoring.predictions import predict
from pipeline.storage.cache import CacheFolder
from pipeline.training.checkpoints import save_weights
from pipeline.training.evaluation import Evaluation
from pipeline.training.loop import Trainer

_SECONDS = 450.0
"""For all of it."""
_COMPILING_SECONDS = 60.0
"""What a network takes at most to be compiled; where less is left it is not."""

_COMPILED = "compiled, "

Table = list[tuple[str, ...]]
"""Rows of text; the first one is the header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured, and for how long."""

    teachers: tuple[str, ...] = ("passt_s_swa_p16_128_ap476", "ast_base_p16_s10")
    teacher_batches: tuple[int, ...] = (16, 64, 128)
    precisions: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
    compiles: bool = True
    """Whether networks are also compiled, in the last of the precisions: teachers for the largest batch."""
    students: tuple[tuple[str, int], ...] = (("mn04", 120), ("mn10", 120), ("mn40", 60), ("dymn10", 120))
    """Name and clips a step."""
    clips: int = 6_000
    """In the dataset that is written."""
    shard_clips: int = 500
    repeats: int = 7
    warm: int = 3


SMALL = Plan(
    teachers=("passt_tiny",),
    teacher_batches=(2,),
    precisions=("float32",),
    compiles=False,
    students=(("mn01", 2),),
    clips=8,
    shard_clips=4,
    repeats=1,
    warm=1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The machine, and what is to be measured on it."""

    device: torch.device
    plan: Plan
    data: Manifest
    folder: Path
    ends_at: float
    """By `time.perf_counter`."""

    def seconds(self, act: Callable[[], object]) -> float:
        """Returns how long something takes until the device has done it: the median."""
        for _ in range(self.plan.warm):
            act()
        return median(self._timed(act) for _ in range(self.plan.repeats))

    def _timed(self, act: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def has_time(self) -> bool:
        """Whether there is time for what takes the better part of a minute to prepare."""
        return time.perf_counter() < self.ends_at - _COMPILING_SECONDS


def limits(bench: Bench) -> tuple[Table, dict[str, float]]:
    """The fastest product of matrices in each precision, in FLOP/s, and the fastest copies."""
    table, peaks = [("limit", "measured")], {}
    for precision in bench.plan.precisions:
        compute_in(precision, [])
        peaks[precision] = matrix_peak(bench.device, tensor_dtype(precision))
        table.append((f"product of matrices, {precision}", f"{peaks[precision] / 1e12:,.2f} TFLOP/s"))
    compute_in("float32", [])
    size = 4 * SAMPLES * (120 if bench.device.type == "cuda" else 4)
    on_gpu = bench.device.type == "cuda"
    pinned, plain = (torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu and pin) for pin in (True, False))
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for name, source in (("page-locked", pinned), ("ordinary", plain)):
        seconds = bench.seconds(lambda source=source: there.copy_(source, non_blocking=True))
        table.append((f"copy to the device from {name} memory", f"{size / seconds / 1e9:.1f} GB/s"))
    return table, peaks


def teachers(bench: Bench, peaks: dict[str, float]) -> Table:
    """Waveforms on the device → logits."""
    table: Table = [("teacher", "batch", "precision", "compiled", "clips/s", "of the product's limit")]
    for name in bench.plan.teachers:
        flops = float(teacher.count_complexity(teacher.model_card(name)).flops)
        ways: list[tuple[Precision, bool, tuple[int, ...]]]
        ways = [(precision, False, bench.plan.teacher_batches) for precision in bench.plan.precisions]
        if bench.plan.compiles:
            ways.append((bench.plan.precisions[-1], True, bench.plan.teacher_batches[-1:]))
        for precision, compiled, batches in ways:
            torch.compiler.reset()  # or what was compiled for others would count against this one
            network = teacher.create_model(name).to(bench.device)
            ensemble = teacher.Ensemble([network], [1.0], tensor_dtype(precision), compiled=compiled)
            compute_in(precision, ensemble.members)
            rate = ensemble.sample_rates_hz[0]
            for batch in batches:
                sounds = {rate: 0.1 * torch.randn(batch, round(10 * rate), device=bench.device)}
                speed = batch / bench.seconds(lambda sounds=sounds, ensemble=ensemble: ensemble(sounds))
                share = f"{100 * speed * flops / peaks[precision]:.0f} %"
                table.append((name, str(batch), precision, "yes" if compiled else "no", f"{speed:,.0f}", share))
    compute_in("float32", [])
    return table


def dearest_kernels(bench: Bench) -> Table:
    """What the first teacher spends its time on."""
    network = teacher.create_model(bench.plan.teachers[0]).to(bench.device)
    ensemble = teacher.Ensemble([network], [1.0], tensor_dtype(bench.plan.precisions[-1]))
    rate = ensemble.sample_rates_hz[0]
    sounds = {rate: torch.zeros(bench.plan.teacher_batches[-1], round(10 * rate), device=bench.device)}
    ensemble(sounds)
    on_gpu = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        ensemble(sounds)
        bench.wait()
    cost = (lambda event: event.self_device_time_total) if on_gpu else (lambda event: event.self_cpu_time_total)
    events = sorted(profiler.key_averages(), key=cost, reverse=True)
    total = sum(map(cost, events)) or 1
    return [
        (f"dearest of {bench.plan.teachers[0]}", "share"),
        *((str(event.key)[:70], f"{100 * cost(event) / total:.0f} %") for event in events[:8]),
    ]


def stage_1(bench: Bench) -> Table:
    """Shards → published parts, one labeller in this process, then actors on Ray."""
    specs = []
    for name in bench.plan.teachers:
        torch.manual_seed(0)
        path = bench.folder / f"{name}.safetensors"
        network, vocabulary = teacher.create_model(name, num_classes=len(bench.data.vocabulary)), bench.data.vocabulary
        metadata = {"stage": "teacher", "model": name, "kwargs": {}, "classes": len(vocabulary)}
        save_weights(path, network.state_dict(), {**metadata, "vocabulary_sha256": vocabulary.sha256})
        specs.append(TeacherSpec.parse(f"{name}={path}"))
    table: Table = [("stage 1", "batch", "clips/s", "waiting for clips")]
    for batch in bench.plan.teacher_batches[:2]:
        for count in sorted({1, len(specs)}):
            table.append(_label(bench, tuple(specs[:count]), batch, on_ray=False))
    table.append(_label(bench, tuple(specs[:1]), bench.plan.teacher_batches[-1], on_ray=True))
    return table


def _label(bench: Bench, specs: tuple[TeacherSpec, ...], batch: int, *, on_ray: bool) -> tuple[str, ...]:
    store = str(bench.folder / f"store-{batch}-{len(specs)}-{on_ray}")
    stamp = stamp_teachers(specs, bench.data, bench.plan.precisions[-1])
    write_stamp(store, stamp)
    device = str(bench.device)
    config = LabellerConfig(
        data=bench.data.location, store=store, teachers=specs, stamp=stamp, batch_size=batch, device=device
    )
    name = f"{' + '.join(spec.name for spec in specs)}, {stamp.precision}"
    shards = bench.data.shards
    if on_ray:
        from pipeline.labelling.actor_pool import label_shards
        from pipeline.runtime.ray_session import running_ray

        clips = {shard: len(bench.data.rows_of_shard(shard)) for shard in shards}
        started = time.perf_counter()
        with running_ray(None), closing(label_shards(config, clips, on_clips=lambda clips: None)) as outcomes:
            done = list(outcomes)
        if failed := [outcome.error for outcome in done if outcome.error]:
            raise SystemExit(f"stage 1 failed: {failed[0]}")
        seconds, name = time.perf_counter() - started, f"{name}, through Ray, its start included"
        waiting = sum(outcome.waiting_seconds for outcome in done) / sum(outcome.seconds for outcome in done)
    else:
        if bench.device.type == "cuda":  # as an actor has all of its cores
            torch.set_num_threads(usable_cores())
        done = []
        with closing(ShardLabeller(config)) as labeller:
            started = time.perf_counter()
            with Publisher() as publisher:
                for shard, after in pairwise([*shards, ""]):
                    made = labeller.compute(shard, following=after or None)
                    publisher.wait()
                    publisher.submit(shard, lambda made=made: done.append(labeller.publish(made)))
            seconds = time.perf_counter() - started
        waiting = sum(report.waiting_seconds for report in done) / seconds
    return name, str(batch), f"{len(bench.data) / seconds:,.0f}", f"{100 * waiting:.0f} %"


def students(bench: Bench, peaks: dict[str, float], checkout: Path | None) -> Table:
    """A batch in the loader's memory → updated weights."""
    table: Table = [
        ("student", "clips a step", "precision", "clips/s", "of the limit", "launches", "copies", "synchronisations")
    ]
    for name, clips in bench.plan.students:
        flops = BACKWARD_SHARE * 2.0 * student.count_complexity(student.create_model(name)).macs
        for owner, precision, make in _ways_to_train(bench, name, clips, checkout):
            if owner == _COMPILED and not bench.has_time:
                table.append((f"{owner}{name}", str(clips), precision, "no time was left", "", "", "", ""))
                continue
            step = make()
            speed = clips / bench.seconds(step)
            calls = count_calls(step, bench.device)
            share = f"{100 * speed * flops / peaks[precision]:.0f} %"
            counts = (str(calls[kind]) for kind in ("launches", "copies", "synchronisations"))
            table.append((f"{owner}{name}", str(clips), precision, f"{speed:,.0f}", share, *counts))
    compute_in("float32", [])
    return table


def _ways_to_train(
    bench: Bench, name: str, clips: int, checkout: Path | None
) -> Iterator[tuple[str, Precision, Callable[..., Callable[[], object]]]]:
    """Yields whose step, its precision, and what makes it ready."""
    step = partial(training_step, name, clips, bench.device)
    precisions: list[Precision] = [precision for precision in bench.plan.precisions if precision != "tf32"]
    for precision in precisions:
        yield "", precision, partial(step, precision)
    if bench.plan.compiles:
        yield _COMPILED, precisions[-1], partial(step, precisions[-1], compiled=True)
    if checkout is not None and name.startswith(("mn", "dymn")):
        yield "EfficientAT, ", "float32", partial(upstream_step, bench, checkout, name, clips)


def upstream_step(bench: Bench, checkout: Path, name: str, clips: int) -> Callable[[], object]:
    """A step of EfficientAT's own model and front end, as its ex_audioset.py makes it, in float32."""
    sys.path.insert(0, str(checkout))
    from models.preprocess import AugmentMelSTFT  # pyright: ignore[reportMissingImports]

    width = int(name[-2:]) / 10
    if name.startswith("dymn"):
        from models.dymn.model import get_model  # pyright: ignore[reportMissingImports]
    else:
        from models.mn.model import get_model  # pyright: ignore[reportMissingImports]
    model = get_model(width_mult=width, pretrained_name=None).to(bench.device).train()
    mel = AugmentMelSTFT(freqm=0, timem=0).to(bench.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-4)
    batch, random = make_batch(clips), np.random.default_rng(0)

    def loss(logits: Tensor, targets: Tensor, partner: Tensor, share: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits
        each = bce(logits, targets, reduction="none").mean(dim=1) * share
        return (each + bce(logits, targets[partner], reduction="none").mean(dim=1) * (1 - share)).mean()

    def step() -> None:
        there = batch.to(bench.device)
        images = mel(there.waveforms)[:, None]
        partner = torch.randperm(clips, device=bench.device)
        drawn = random.beta(0.3, 0.3, clips)
        share = torch.tensor(np.maximum(drawn, 1 - drawn), dtype=torch.float32, device=bench.device)
        side = share.view(-1, 1, 1, 1)
        logits, _ = model(images * side + images[partner] * (1 - side))
        teacher_probs = there.teacher_logits.sigmoid()
        total = 0.1 * loss(logits, there.labels, partner, share) + 0.9 * loss(logits, teacher_probs, partner, share)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def feeding(bench: Bench) -> Table:
    """Shards → batches in page-locked memory, from the shards and from the cache; and a student's evaluation."""
    table: Table = [("from shards", "processes", "clips/s", "a process")]
    processes = loader_processes(None, bench.device)
    cache = WaveformCache(
        CacheFolder(bench.folder / "cache", 2 * len(bench.data) * 2 * SAMPLES),
        bench.data,
        sample_rate_hz=RATE_HZ,
        samples=SAMPLES,
    )
    for name, kept in (("decoded", None), ("decoded and kept", cache), ("from the cache", cache)):
        dataset = JoinedDataset(bench.data, sample_rate_hz=RATE_HZ, seconds=SAMPLES / RATE_HZ, cache=kept)
        started = time.perf_counter()
        for batch in _batches(bench, dataset):
            assert batch.valid.all()
        speed = len(bench.data) / (time.perf_counter() - started)
        table.append((name, str(processes), f"{speed:,.0f}", f"{speed / max(processes, 1):,.0f}"))
    model = student.create_model(bench.plan.students[0][0], num_classes=len(bench.data.vocabulary)).to(bench.device)
    dataset = JoinedDataset(bench.data, sample_rate_hz=RATE_HZ, seconds=SAMPLES / RATE_HZ, cache=cache)
    started = time.perf_counter()
    predict([model], _batches(bench, dataset), device=bench.device)
    speed = len(bench.data) / (time.perf_counter() - started)
    name = f"evaluation of {bench.plan.students[0][0]}, from the cache"
    table.append((name, str(processes), f"{speed:,.0f}", f"{speed / max(processes, 1):,.0f}"))
    return table


def first_epoch(bench: Bench) -> Table:
    """Where the time of a run's first epoch goes that its second has not to spend: the command's own run."""
    name, clips = bench.plan.students[0]
    config = TrainStudentConfig(
        data=bench.data.location,
        eval_data=bench.data.location,
        run=str(bench.folder / "run"),
        model=name,
        batch_size=clips,
        epochs=2,
        cache=str(bench.folder / "run-cache"),
        device=str(bench.device),
    )
    with (
        _timed(DecodingPool, "__init__") as starts,
        _timed(Trainer, "warm_up") as warm_ups,
        _timed(Evaluation, "run") as evaluations,
    ):
        train_student.run(config)
    first, second = (line for line in read_metrics(config.run) if "epoch/clips_per_second" in line)
    table: Table = [(f"epochs of {name}", "first, s", "second, s")]
    prepared = {"starting the processes that decode": sum(starts), "warming up": sum(warm_ups)}
    table += [(part, f"{seconds:.1f}", "") for part, seconds in prepared.items()]
    lasted, waited = [], []
    for epoch in (first, second):
        seconds = len(bench.data) // clips * clips / epoch["epoch/clips_per_second"]
        waited.append(seconds * epoch["epoch/data_wait_share"])
        lasted.append(seconds - waited[-1])
    lasted[0] -= sum(prepared.values())
    for part, times in (
        ("waiting for clips", waited),
        ("steps, and logs opened", lasted),
        ("evaluation", evaluations),
    ):
        table.append((part, *(f"{seconds:.1f}" for seconds in times)))
    return table


@contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """Yields the seconds of each call of a method in the block."""
    method, seconds = getattr(owner, name), []

    def timed(*given: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*given, **more)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def _batches(bench: Bench, dataset: JoinedDataset) -> Iterable[TrainingBatch]:
    clips = len(bench.data)
    rows = np.split(np.arange(clips), np.arange(MAX_SCORED, clips, MAX_SCORED))
    return batch_loader(dataset, rows, workers=None, device=bench.device)


def markdown(table: Table) -> str:
    """Spell a table."""
    header, *rows = table
    lines = [header, tuple("---" if column == 0 else "---:" for column in range(len(header))), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def measure(bench: Bench, checkout: Path | None, say: Callable[[str], None]) -> None:
    """Measure everything, and say each table as it is there."""
    on_gpu = bench.device.type == "cuda"
    card = torch.cuda.get_device_name(bench.device) if on_gpu else f"{platform.machine()}, no GPU"
    say(f"{card}, {usable_cores()} cores, torch {torch.__version__}, {len(bench.data)} clips\n")
    table, peaks = limits(bench)
    say(markdown(table))
    for made in (
        lambda: teachers(bench, peaks),
        lambda: dearest_kernels(bench),
        lambda: feeding(bench),
        lambda: stage_1(bench),
        lambda: first_epoch(bench),
        lambda: students(bench, peaks, checkout),
    ):
        say(f"\n{markdown(made())}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    parser.add_argument("--small", action="store_true", help="tiny models and few clips: shows that it runs")
    parser.add_argument("--data", help="a dataset with AudioSet's classes, instead of one that is written")
    parser.add_argument("--efficientat", type=Path, help="a checkout of EfficientAT, to be measured beside ours")
    parser.add_argument("--out", type=Path, help="file that receives the tables")
    options = parser.parse_args(arguments)
    plan = SMALL if options.small else Plan()
    said: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        if options.data is None:
            (folder / "data").mkdir()
            write_dataset(folder / "data", plan.clips, clips_per_shard=plan.shard_clips)
        data = read_manifest(options.data or str(folder / "data"))
        if len(data.vocabulary) != CLASSES:
            raise SystemExit(f"{options.data}: has {len(data.vocabulary)} classes; give a dataset with AudioSet's 527")
        started = time.perf_counter()
        bench = Bench(
            device=choose_device(options.device), plan=plan, data=data, folder=folder, ends_at=started + _SECONDS
        )
        measure(bench, options.efficientat, say)
        say(f"\nmeasured in {time.perf_counter() - started:.0f} s")
    if options.out is not None:
        options.out.write_text("\n".join(said) + "\n", encoding="utf-8")


if __name__ == "__main__":
    limit_threads()
    main()
