"""From typing `pipeline tag` to its first tag, and to the prompt, beside what `import torch` takes alone.

    python -m benchmarks.first_tag SOUND --checkpoint RUN [FILE.onnx …] [--against CHECKOUT] [--rounds 5]

Each is a process of its own, and they take turns; the least of the rounds counts, so that files are in the machine's
cache. Another checkout of this repository is measured beside this one.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parents[1]
BASELINE = "import torch"


class Seconds(NamedTuple):
    """What a process takes."""

    first: float
    """Up to the first line that it prints."""
    end: float


def time_process(arguments: list[str], checkout: Path) -> Seconds:
    """Returns what Python takes with arguments, with the packages of a checkout.

    Raises:
        SystemExit: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-P", *arguments], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = time.perf_counter() - begun
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return Seconds(first, time.perf_counter() - begun)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sound")
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"": HERE} if options.against is None else {"": HERE, " there": options.against.resolve()}
    ways = {BASELINE: (["-c", "import torch; print(torch.__version__, flush=True)"], HERE)}
    for checkpoint in options.checkpoint:
        # One object a sound, which is printed with its tags: a table's title would come alone.
        tag = ["-m", "pipeline", "tag", options.sound, "--checkpoint", checkpoint, "--json"]
        ways |= {f"{checkpoint}{there}": (tag, folder) for there, folder in checkouts.items()}
    rounds = [{name: time_process(*way) for name, way in ways.items()} for _ in range(options.rounds)]
    least = {name: Seconds(*map(min, zip(*(one[name] for one in rounds), strict=True))) for name in ways}
    print("| | first tag, s | prompt, s | x `import torch` |\n|---|---:|---:|---:|")
    for name, found in least.items():
        print(f"| {name} | {found.first:.2f} | {found.end:.2f} | {found.first / least[BASELINE].first:.2f} |")


if __name__ == "__main__":
    main()
