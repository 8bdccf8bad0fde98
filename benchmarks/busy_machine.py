"""How fast a student trains on an idle machine and beside other work, by how OpenMP's idle threads wait.

    OMP_NUM_THREADS=2 python -m benchmarks.busy_machine [--busy 2] [--settings none GOMP_SPINCOUNT=10000 …]
    OMP_NUM_THREADS=2 python -m benchmarks.busy_machine --preload libiomp5.so --settings none KMP_BLOCKTIME=1

A setting is a variable of the environment, and `none` is what the library does by itself: GNU's libgomp, which torch
brings, looks 300,000 times whether there is work before a thread sleeps (GOMP_SPINCOUNT), Intel's and LLVM's, which
other builds of torch have, for 200 ms (KMP_BLOCKTIME). Every setting has its own process; they
take turns, on an idle machine and then beside as many endless loops as `--busy` says. Ratios are medians of the rounds'
ratios to the first setting.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

STEP = """
import json, sys, time
import torch
import student
from benchmarks.student import Ours, Way, make_batch
torch.manual_seed(0)
runner = Ours(student.create_model(sys.argv[1]), make_batch(int(sys.argv[2])), torch.device("cpu"), Way("", "float32"))
runner.train()
print("ready", flush=True)
for line in sys.stdin:
    end, steps, start = float(line), 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < end:
        runner.train()
        steps += 1
    print(json.dumps(steps / (time.perf_counter() - start)), flush=True)
"""


WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SETTINGS = ["none", "OMP_WAIT_POLICY=PASSIVE", *(f"GOMP_SPINCOUNT={turns}" for turns in (1_000, 10_000, 100_000))]


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep so many cores busy for as long as the block lasts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Training:
    """A process that trains with one setting when it is asked to."""

    def __init__(self, setting: str, options: argparse.Namespace) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in WAITING}
        environment |= {} if setting == "none" else dict([setting.split("=")])
        environment |= {"LD_PRELOAD": options.preload} if options.preload else {}
        command = [sys.executable, "-c", STEP, options.model, str(options.batch)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def clips_per_second(self, seconds: float, batch: int) -> float:
        """Train for so long, alone among the settings."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(seconds, file=self.process.stdin)
        return batch * json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Print what was measured, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="mn04", help="registered name of the student")
    parser.add_argument("--batch", type=int, default=16, help="clips of 10 s a step")
    parser.add_argument("--busy", type=int, default=2, help="endless loops beside it")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each setting")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--preload", help="another OpenMP library, in the place of torch's own")
    options = parser.parse_args()
    trainings = {setting: Training(setting, options) for setting in options.settings}
    found: dict[tuple[str, int], list[float]] = {}
    for busy in (0, options.busy):
        with busy_loops(busy):
            time.sleep(0.5)
            for _ in range(options.rounds):
                for setting, training in trainings.items():
                    speed = training.clips_per_second(options.seconds, options.batch)
                    found.setdefault((setting, busy), []).append(speed)
    for training in trainings.values():
        training.close()
    print(f"| setting | idle, clips/s | x {options.settings[0]} | beside {options.busy} loops | x |")
    print("|---|---:|---:|---:|---:|")
    for setting in options.settings:
        cells = []
        for busy in (0, options.busy):
            own, base = np.array(found[setting, busy]), np.array(found[options.settings[0], busy])
            cells.append(f"{np.median(own):.2f} | {np.median(own / base):.2f}")
        print(f"| {setting} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
