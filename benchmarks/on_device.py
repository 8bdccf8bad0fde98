"""What students cost on one core of a device: size, time and memory of their exported files, beside torch and a peer.

    python -m benchmarks.on_device --folder FILES --export-only    # writes what is measured, if it isn't there
    python -m benchmarks.on_device --folder FILES --peer theirs=FILE.onnx other=my_package:function
    python -m benchmarks.on_device --front-ends

A peer is an ONNX file that takes waveforms, (batch, samples), or a function of one; two are here, as others' packages
run them: `benchmarks.on_device:passt` (hear21passt) and `benchmarks.on_device:ast` (transformers). Times are the least
of several runs, in CPU time of the process, so that what else a machine does is left out as far as may be. Weights are
drawn at random, which changes nothing of that.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np

SECONDS = 10.0
RUNS = 20
_LONGEST_SECONDS = 10
"""Fewer runs of what is slow."""
FACTORS = ((1, 1024), (8, 128), (16, 64), (32, 32), (64, 16))
"""Of 1024: the length of the second stage and of the first; with 1 it is a plain product of matrices."""


def least_ms(run: Callable[[], object]) -> float:
    """Returns the CPU time of the quickest of some runs, in milliseconds."""
    run()
    times: list[float] = []
    while len(times) < RUNS and (len(times) < 3 or sum(times) < _LONGEST_SECONDS):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return 1000 * min(times)


def onnx_function(path: str) -> Callable[[np.ndarray], object]:
    """Returns what runs an ONNX file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda waveforms: session.run(None, {given.name: waveforms})


def torch_function(name: str) -> Callable[[np.ndarray], object]:
    """Returns a student as torch runs it."""
    import torch

    import student

    torch.set_num_threads(1)
    network = student.fuse(student.create_model(name))

    @torch.inference_mode()
    def run(waveforms: np.ndarray) -> object:
        return network(network.front_end(torch.from_numpy(waveforms))).sigmoid()

    return run


def measure(kind: str, what: str, rate_hz: int) -> dict[str, float]:
    """Returns milliseconds, and the process's peak of memory in megabytes, of one model on one sound."""
    if kind == "torch":
        function = torch_function(what)
    elif what.endswith(".onnx"):
        function = onnx_function(what)
    else:
        module, _, name = what.partition(":")
        function = getattr(importlib.import_module(module), name)
    sound = noise(1, rate_hz)
    return {"ms": least_ms(lambda: function(sound)), "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Returns how much memory this process has held at most, in megabytes (Linux: `getrusage` counts the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_a_process(kind: str, what: str, rate_hz: int) -> dict[str, float]:
    """Measure in a process of its own, whose memory is the model's alone."""
    command = [sys.executable, "-m", "benchmarks.on_device", "--one", kind, what, str(rate_hz)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def export(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a student of random weights as `pipeline export` does, in float and in integers, if it isn't there."""
    import student
    from pipeline.dataset.vocabulary import audioset_vocabulary
    from pipeline.exporting.exported_model import ExportedModel, describe
    from pipeline.exporting.onnx_file import OPSET, write_onnx
    from pipeline.exporting.quantising import quantise
    from pipeline.models.loading import LoadedModel

    floats, integers = folder / f"{name}.onnx", folder / f"{name}_int8.onnx"
    if not floats.exists():
        network = student.fuse(student.create_model(name))
        model = LoadedModel(
            network=network,
            name=name,
            source=name,
            sha256="",
            sample_rate_hz=network.sample_rate_hz,
            input_seconds=network.input_seconds,
            vocabulary=audioset_vocabulary(),
            model_name=name,
            front_end=str(network.front_end.config),
        )
        exported = ExportedModel(model, "probabilities", "inside")
        write_onnx(exported, describe(model, exported, licence=None, exporter=f"opset {OPSET}"), floats)
    if not integers.exists():
        quantise(floats, integers, list(noise(4, 32_000)))
    return floats, integers


def noise(sounds: int, rate_hz: int) -> np.ndarray:
    """Returns (sounds, samples), float32."""
    random = np.random.default_rng(0)
    return 0.1 * random.standard_normal((sounds, round(SECONDS * rate_hz)), dtype=np.float32)


def passt(waveforms: np.ndarray) -> object:
    """PaSST as hear21passt runs it, of random weights; (batch, samples) at 32 kHz."""
    return _transformer("passt_s_swa_p16_128_ap476")(waveforms)


def ast(waveforms: np.ndarray) -> object:
    """AST as transformers runs it, of random weights; (batch, samples) at 16 kHz."""
    return _transformer("ast_base_p16_s10_hf")(waveforms)


@cache
def _transformer(name: str) -> Callable[[np.ndarray], object]:
    import torch

    from benchmarks.teachers import build_theirs, run_theirs

    torch.set_num_threads(1)
    run = run_theirs(name, build_theirs(name, "cpu"), "cpu")
    return lambda waveforms: run(torch.from_numpy(waveforms))


def tell(name: str, engine: str, found: dict[str, float], file: Path | None = None) -> None:
    """Print a row."""
    size = f"{file.stat().st_size / 1e6:.2f}" if file is not None else ""
    factor = found["ms"] / 1000 / SECONDS
    print(f"| {name} | {engine} | {size} | {found['ms']:.1f} | {factor:.4f} | {found['peak_mb']:.0f} |", flush=True)


def measure_front_ends(folder: Path) -> None:
    """Print what each form of the front end's Fourier transform costs in ONNX Runtime, and torch's own."""
    import torch

    import student

    torch.set_num_threads(1)
    config = student.FrontEndConfig()
    sound = 0.1 * torch.randn(1, round(SECONDS * config.sample_rate_hz))
    free = torch.export.Dim.DYNAMIC
    print("| stages | MMACs for a frame | ms for 10 s |\n|---|---|---|")
    for factors in FACTORS:
        front_end = student.DftFrontEnd(config, factors).eval()
        path = folder / "front_end.onnx"
        torch.onnx.export(
            front_end, (sound.repeat(2, 1),), path, dynamo=True, dynamic_shapes=({0: free, 1: free},), verbose=False
        )
        run = onnx_function(str(path))
        cost = front_end.macs_per_frame / 1e6
        print(f"| {factors[0]} x {factors[1]} | {cost:.2f} | {least_ms(partial(run, sound.numpy())):.1f} |", flush=True)
    original = student.LogMelFrontEnd(config).eval()
    print(f"| torch.stft, in torch | | {least_ms(lambda: original(sound)):.1f} |")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mn01", "mn02", "mn04", "mn10", "dymn04"])
    parser.add_argument("--folder", type=Path, help="keeps the exported files; by default they are written anew")
    parser.add_argument("--export-only", action="store_true", help="measure nothing")
    parser.add_argument("--peer", nargs="*", default=[], help="NAME=FILE.onnx or NAME=module:function, @RATE_HZ behind")
    parser.add_argument("--front-ends", action="store_true", help="measure the front end's forms alone")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, what, rate = given.one
        print(json.dumps(measure(kind, what, int(rate))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if given.front_ends:
            measure_front_ends(folder)
            return
        files = {model: export(model, folder) for model in given.models}
        if given.export_only:
            return
        print("| model | runs in | file, MB | ms for 10 s | real-time factor | peak memory, MB |\n" + 6 * "|---" + "|")
        for model, (floats, integers) in files.items():
            tell(model, "ONNX Runtime", in_a_process("peer", str(floats), 32_000), floats)
            tell(model, "ONNX Runtime, int8", in_a_process("peer", str(integers), 32_000), integers)
            tell(model, "torch", in_a_process("torch", model, 32_000))
        for peer in given.peer:
            called, _, what = peer.partition("=")
            what, _, rate = what.partition("@")
            tell(called, "its own", in_a_process("peer", what, int(rate or 32_000)))


if __name__ == "__main__":
    main()
