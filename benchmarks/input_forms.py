"""What a core decodes in a second of each form that clips come in, and what two million of them take on a disk.

    OMP_NUM_THREADS=1 python -m benchmarks.input_forms [--clips 10]

Ten seconds of the sample's own sounds, brought into each form by ffmpeg, become waveforms at 32 kHz as a loader makes
them. Times are CPU times of one thread, the least of three, so that other work on the machine counts little.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.audio import load_waveform
from pipeline.dataset.manifest import SCHEMA, Manifest
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.storage.cache import CacheFolder

RATE_HZ, SECONDS, CLIPS = 32_000, 10, 2_000_000
SOUNDS = Path(__file__).resolve().parents[1] / "manifests" / "sample" / "audio"
FORMS = {
    "Opus, 48 kHz mono, 64 kbit/s": ("opus", "-ac 1 -ar 48000 -c:a libopus -b:a 64k"),
    "MP3, 44.1 kHz stereo, 128 kbit/s": ("mp3", "-ac 2 -ar 44100 -c:a libmp3lame -b:a 128k"),
    "FLAC, 48 kHz stereo, as a source has it": ("flac", "-ac 2 -ar 48000 -c:a flac -sample_fmt s16"),
    "Vorbis, 32 kHz mono": ("ogg", "-ac 1 -ar 32000 -c:a libvorbis"),
    "FLAC, 32 kHz mono (`--transcode flac --sample-rate 32000`)": ("flac", "-ac 1 -ar 32000 -c:a flac -sample_fmt s16"),
}
"""Name → extension and ffmpeg's arguments."""
FED = {"an H100 in stage 1": 1_300, "an H100 that trains mn10": 2_500}
"""What is fed → clips/s."""


def cpu_seconds(act: Callable[[], object]) -> float:
    """The least that it took this thread."""
    times = []
    for _ in range(3):
        started = time.thread_time()
        act()
        times.append(time.thread_time() - started)
    return min(times)


def encoded(sound: Path, folder: Path, extension: str, arguments: str) -> bytes:
    """Ten seconds of a sound, over and over, in one of the forms."""
    target = folder / f"clip.{extension}"
    command = ["ffmpeg", "-y", "-v", "error", "-stream_loop", "9", "-i", str(sound), "-t", str(SECONDS)]
    subprocess.run([*command, *arguments.split(), str(target)], check=True)
    return target.read_bytes()


def row(name: str, seconds: float, size: float) -> str:
    """A line of the table."""
    cores = " | ".join(f"{speed * seconds:.1f}" for speed in FED.values())
    return f"| {name} | {1 / seconds:,.0f} | {size / 1e3:.0f} | {CLIPS * size / 1e12:.2f} | {cores} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clips", type=int, default=10, help="sounds of the sample, 1 to 150")
    options = parser.parse_args()
    sounds = sorted(SOUNDS.glob("*.opus"))[: options.clips]
    print(f"| form | clips/s a core | kB a clip | TB for 2 M clips | {' | '.join(f'cores for {who}' for who in FED)} |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        folder, waveform = Path(temporary), np.zeros(0, np.float32)
        for name, (extension, arguments) in FORMS.items():
            clips = [encoded(sound, folder, extension, arguments) for sound in sounds]
            decode = [
                cpu_seconds(lambda clip=clip: load_waveform(clip, sample_rate_hz=RATE_HZ, seconds=SECONDS))
                for clip in clips
            ]
            print(row(name, float(np.mean(decode)), float(np.mean([len(clip) for clip in clips]))), flush=True)
            waveform = load_waveform(clips[-1], sample_rate_hz=RATE_HZ, seconds=SECONDS)
        manifest = Manifest(str(folder), SCHEMA.empty_table(), audioset_vocabulary())
        cache = WaveformCache(CacheFolder(folder, 1e9), manifest, sample_rate_hz=RATE_HZ, samples=len(waveform))
        cache.write(0, waveform)
        assert cache.read(0) is not None
        print(row("kept by `--cache-audio`", cpu_seconds(lambda: cache.read(0)), cache.path.stat().st_size))


if __name__ == "__main__":
    main()
