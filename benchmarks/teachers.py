"""Compares teachers' speed and memory with the projects that they come from, waveform to logits.

    OMP_NUM_THREADS=2 python -m benchmarks.teachers
    OMP_NUM_THREADS=2 python -m benchmarks.teachers --memory
    OMP_NUM_THREADS=2 python -m benchmarks.teachers --models eat beats m2d --checkouts DIR

`hear21passt` and `transformers` run as their documentation runs them, in float32, with the same random weights as ours;
nothing is downloaded. The other families' originals run from checkouts, as `benchmarks.originals` says. The systems
take turns, so that a disturbance meets all of them; ratios are medians of the ratios within a round. A share of the
limit compares with the fastest large matrix product of the same run.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import teacher
from benchmarks.originals import ORIGINALS, Original
from pipeline.runtime.memory import keep_freed_memory
from teacher.inference import InferenceLinear

Forward = Callable[[Tensor], Tensor]
"""(batch, samples) on the CPU → (batch, classes)."""

PASST, AST = "passt_s_swa_p16_128_ap476", "ast_base_p16_s10_hf"
MODELS = {
    "passt": PASST,
    "ast": AST,
    "eat": "eat_base_epoch30_ap489",
    "eat_large": "eat_large_epoch20_ap495",
    "beats": "beats_iter3_plus_as2m",
    "m2d": "m2d_clap_base_p16_ap485",
    "atst_frame": "atst_frame_base",
    "atst_clip": "atst_clip_base",
}
THEIRS = dict.fromkeys(MODELS.values(), "original") | {PASST: "hear21passt", AST: "transformers"}
CLASSES = 527


def rate_hz(model: str) -> int:
    """Returns the sample rate of a model's waveforms."""
    return teacher.model_card(model).front_end.sample_rate_hz


@dataclass(frozen=True, slots=True)
class System:
    """One way to run one model."""

    model: str
    name: str
    precision: torch.dtype
    forward: Forward


def build_original(model: str, checkouts: Path) -> Original:
    """Build a model as its checkout has it, with random weights, drawn from a fixed seed."""
    torch.manual_seed(0)
    card = teacher.model_card(model)
    return ORIGINALS[card.network.__name__](checkouts, card, CLASSES)


def run_original(original: Original) -> Forward:
    """Run a checkout's network as its script does: features clip by clip, then the network on all of them."""

    def forward(waveforms: Tensor) -> Tensor:
        with torch.no_grad():
            return original.logits(torch.cat([original.features(clip) for clip in waveforms]))

    return forward


def build_theirs(model: str, device: str) -> nn.Module:
    """Build the other project's model with random weights, drawn from a fixed seed."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model == PASST:
            from hear21passt.models.passt import get_model
            from hear21passt.models.preprocess import AugmentMelSTFT
            from hear21passt.wrapper import PasstBasicWrapper

            mel = AugmentMelSTFT(hopsize=320, freqm=48, timem=192, fmin_aug_range=10, fmax_aug_range=2000)
            network = PasstBasicWrapper(mel=mel, net=get_model(arch=PASST, pretrained=False), mode="logits")
        else:
            import transformers

            configure: Any = transformers.ASTConfig  # its decorators hide what it takes
            network = transformers.ASTForAudioClassification(configure(num_labels=527))
    network.eval()
    return nn.Module.to(network, device)


def run_theirs(model: str, network: nn.Module, device: str) -> Forward:
    """Run the network as the README of `hear21passt` and the model page of `transformers` do."""
    if model == PASST:

        def forward(waveforms: Tensor) -> Tensor:
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                return network(waveforms.to(device))
    else:
        import transformers

        extractor = transformers.ASTFeatureExtractor()

        def forward(waveforms: Tensor) -> Tensor:
            inputs = extractor(list(waveforms.numpy()), sampling_rate=16000, return_tensors="pt").to(device)
            with torch.no_grad():
                return network(**inputs).logits

    return forward


def run_ours(model: str, weights: dict[str, Tensor], precision: torch.dtype, device: str) -> Forward:
    """Run the network as stage 1 does."""
    network = teacher.create_model(model, weights).to(device)
    ensemble = teacher.Ensemble([network], [1.0], precision)
    return lambda waveforms: ensemble({rate_hz(model): waveforms.to(device)})[0]


def build_system(model: str, name: str, device: str, checkouts: Path | None) -> System:
    """Build one system alone; `name` is the other project's, or a precision of ours."""
    if THEIRS[model] == "original":
        if checkouts is None:
            raise SystemExit(f"{model}: give --checkouts, a folder with its original; see benchmarks/originals.py")
        if device != "cpu":
            raise SystemExit(f"{model}: originals run on the CPU alone; leave --device out")
        original = build_original(model, checkouts)
        theirs = original.network
    else:
        original, theirs = None, build_theirs(model, device)
    if name == THEIRS[model]:
        forward = run_theirs(model, theirs, device) if original is None else run_original(original)
        return System(model, name, torch.float32, forward)
    # `.cpu()` and a copy, as what a checkpoint gives belongs to ours alone.
    weights = {key: tensor.cpu().clone() for key, tensor in theirs.state_dict().items()}
    del theirs
    precision = getattr(torch, name)
    return System(model, f"ours, {name}", precision, run_ours(model, weights, precision, device))


def system_names(model: str, device: str) -> list[str]:
    """Returns the names of what is compared; float16 is for GPUs, few CPUs have instructions for it."""
    return [THEIRS[model], "float32", "bfloat16", *(["float16"] if device != "cpu" else [])]


def flops_of(model: str) -> float:
    """Count the floating-point operations of one clip's matrix products and convolutions, a multiply-add as two."""
    return float(teacher.count_complexity(teacher.model_card(model)).flops)


def wait(device: str) -> None:
    """Let the GPU finish."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time one call."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def product_speed(precision: torch.dtype, device: str) -> float:
    """Operations a second of the fastest of two large matrix products: a square one, and one of ViT-B's layers."""
    side, rows = (4096, 4096) if device == "cpu" else (8192, 65536)
    square = torch.randn(side, side, device=device).to(precision)
    layer = InferenceLinear(nn.Linear(768, 3072, device=device), precision)
    values = torch.randn(rows, 768, device=device).to(precision)
    works = [
        (2 * side**3, lambda: square @ square),
        (2 * rows * 768 * 3072, lambda: layer(values)),
        (2 * rows * 768 * 3072, lambda: F.linear(values, square[:3072, :768])),
    ]
    with torch.inference_mode():
        return max(flops / min(seconds_of(work, device) for _ in range(3)) for flops, work in works)


def clips_of(model: str, batch: int) -> Tensor:
    """(batch, samples): ten seconds of noise that fades in."""
    samples = 10 * rate_hz(model)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (batch, samples)) * np.linspace(0, 1, samples)
    return torch.from_numpy(noise.astype(np.float32))


def compare_speed(
    models: list[str],
    *,
    batch: int,
    rounds: int,
    device: str,
    peak: dict[torch.dtype, float],
    checkouts: Path | None,
) -> None:
    """Print a table: every system run once a round, in turns."""
    systems = [build_system(model, name, device, checkouts) for model in models for name in system_names(model, device)]
    waveforms = {model: clips_of(model, batch) for model in models}
    flops = {model: flops_of(model) for model in models}
    logits = [system.forward(waveforms[system.model][:1]) for system in systems]  # also the warm-up
    times: list[list[float]] = [[] for _ in systems]
    limits: dict[torch.dtype, float] = {}
    for _ in range(rounds):
        for precision in {system.precision for system in systems}:
            limits[precision] = max(limits.get(precision, 0.0), product_speed(precision, device))
        for place, system in enumerate(systems):
            times[place].append(seconds_of(lambda system=system: system.forward(waveforms[system.model]), device))
    limits |= peak
    for precision, limit in limits.items():
        print(f"limit of {str(precision)[6:]}: {limit / 1e9:,.0f} GFLOP/s{' (given)' if precision in peak else ''}")
    print(f"\nbatch {batch}, {rounds} rounds, {torch.get_num_threads()} threads, {device}\n")
    print("| model | system | clips/s | x theirs | GFLOP a clip | GFLOP/s | share of the limit | largest difference |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for place, system in enumerate(systems):
        base = next(number for number, other in enumerate(systems) if other.model == system.model)
        ratio = median(theirs / ours for theirs, ours in zip(times[base], times[place], strict=True))
        speed = batch / median(times[place])
        done = flops[system.model] * speed
        difference = (logits[place].float() - logits[base].float()).abs().max().item()
        print(
            f"| {system.model} | {system.name} | {speed:.3f} | {ratio:.2f} | {flops[system.model] / 1e9:.1f} "
            f"| {done / 1e9:,.0f} | {100 * done / limits[system.precision]:.0f} % | {difference:.1e} |"
        )


def compare_memory(models: list[str], *, batch: int, device: str, checkouts: Path | None) -> None:
    """Print the peak of each system in a process of its own, and that of both of ours as one ensemble."""
    print(f"batch {batch}, {device}: peak memory in MB of a process that runs once, libraries and loading included\n")
    print("| system | peak, MB | before the model was built, MB |\n|---|---:|---:|")
    runs = [f"{model}:{name}" for model in models for name in system_names(model, device)]
    precisions = system_names(PASST, device)[1:]
    runs += [f"{'+'.join(models)}:{name}" for name in precisions] if len(models) == 2 else []
    for run in runs:
        command = [sys.executable, "-m", "benchmarks.teachers", "--alone", run, "--batch", str(batch)]
        command += ["--device", device, *([] if checkouts is None else ["--checkouts", str(checkouts)])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {run} | {found['peak']:,.0f} | {found['before']:,.0f} |", flush=True)


def run_alone(run: str, *, batch: int, device: str, checkouts: Path | None) -> None:
    """Run one system once, loading as its users do, and print the process's peak as JSON."""
    models, name = run.rsplit(":", 1)
    before = peak_megabytes(device)
    if name in THEIRS.values():
        build_system(models, name, device, checkouts).forward(clips_of(models, batch))
    else:
        names = models.split("+")
        members = (teacher.create_model(model).to(device) for model in names)  # one at a time, as stage 1 loads them
        ensemble = teacher.Ensemble(members, [1.0] * len(names), getattr(torch, name))
        ensemble({rate_hz(model): clips_of(model, batch).to(device) for model in names})
    print(json.dumps({"before": before, "peak": peak_megabytes(device)}))


def peak_megabytes(device: str) -> float:
    """Most memory so far: of the GPU, or what the kernel says of this process (Linux)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["passt", "ast"])
    parser.add_argument("--batch", type=int, default=8, help="clips a forward pass")
    parser.add_argument("--rounds", type=int, default=2, help="how often each system is run; the median counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of speed")
    parser.add_argument(
        "--peak",
        action="append",
        default=[],
        metavar="PRECISION=TFLOPS",
        help="of the card, instead of what is measured",
    )
    parser.add_argument("--checkouts", type=Path, help="folder with the originals of the other families")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()  # as stage 1 does; it helps the others as well
    models = [MODELS[name] for name in options.models]
    if options.alone:
        run_alone(options.alone, batch=options.batch, device=options.device, checkouts=options.checkouts)
    elif options.memory:
        compare_memory(models, batch=options.batch, device=options.device, checkouts=options.checkouts)
    else:
        peak = {getattr(torch, name): 1e12 * float(value) for name, value in (text.split("=") for text in options.peak)}
        compare_speed(
            models,
            batch=options.batch,
            rounds=options.rounds,
            device=options.device,
            peak=peak,
            checkouts=options.checkouts,
        )


if __name__ == "__main__":
    main()
