"""What decoding leaves of the thread that launches kernels: in threads, in threads from anonymous files, in processes.

    OMP_NUM_THREADS=1 python -m benchmarks.beside_decoding [--workers 1 2 4 8 16]

A clip of ten seconds is decoded again and again and brought to 32 kHz, while this process's main thread makes calls of
torch that are as small as those that launch kernels; their share is of what it makes alone. `memory` is how the product
reads, from bytes in memory, which libsndfile asks for through Python; `file` gives it an anonymous file instead, where
libsndfile reads the format. Processes are those of the product (`pipeline.decoding`).
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import soundfile
import torch

from benchmarks.bare_decoding import RATE_HZ, BareReader, decode_and_resample
from benchmarks.input_forms import FORMS, SOUNDS, encoded
from pipeline.dataset.audio import mix_channels, resample
from pipeline.decoding.pool import DecodingPool

LIBSNDFILE = ("ogg", "flac")
"""Extensions of what libsndfile decodes."""


def decode_from_file(data: bytes) -> None:
    """Make the waveform of bytes in an anonymous file."""
    descriptor = os.memfd_create("clip")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    with soundfile.SoundFile(descriptor, closefd=True) as file:
        samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    resample(mix_channels(samples), rate, RATE_HZ)


def calls_per_second(seconds: float) -> float:
    """Returns how many small calls of torch this thread makes."""
    value, calls, started = torch.zeros(64), 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        for _ in range(200):
            value.add_(1.0)
        calls += 200
    return calls / passed


@contextmanager
def in_threads(decode: Callable[[bytes], None], clip: bytes, workers: int) -> Iterator[Callable[[], int]]:
    """Decode in threads of this process; yields what tells how many clips are done."""
    done, ended = [0] * workers, threading.Event()

    def work(number: int) -> None:
        while not ended.is_set():
            decode(clip)
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(done)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def in_processes(clip: bytes, workers: int) -> Iterator[Callable[[], int]]:
    """Decode in processes, as the product does."""
    done, ended = [0], threading.Event()

    def work() -> None:
        with DecodingPool(workers) as pool:
            for count in pool.load(BareReader("resample", [clip]), repeat([0])):
                done[0] += count
                if ended.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not done[0]:
            time.sleep(0.01)
        yield lambda: done[0]
    finally:
        ended.set()
        thread.join()


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=1.5, help="length of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls_per_second(0.2)
    alone = calls_per_second(options.seconds)
    print("| form | workers | threads, memory | threads, file | processes |\n|---|---:|---:|---:|---:|")
    sound = sorted(SOUNDS.glob("*.opus"))[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, (extension, arguments) in FORMS.items():
            clip = encoded(sound, Path(folder), extension, arguments)
            for workers in options.workers:
                ways = [in_threads(decode_and_resample, clip, workers), in_processes(clip, workers)]
                if extension in LIBSNDFILE:
                    ways.insert(1, in_threads(decode_from_file, clip, workers))
                cells = []
                for way in ways:
                    with way as clips_done:
                        before, started = clips_done(), time.perf_counter()
                        share = calls_per_second(options.seconds) / alone
                        speed = (clips_done() - before) / (time.perf_counter() - started)
                    cells.append(f"{speed:.0f}/s, {100 * share:.0f} %")
                if extension not in LIBSNDFILE:
                    cells.insert(1, "")
                print(f"| {name} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
