"""Compares the two decoders, libsndfile and FFmpeg's libraries, on a clip of ten seconds in each format that both read.

    OMP_NUM_THREADS=1 python -m benchmarks.decoders

Speed is in seconds of audio per second of one core's time, the best of many runs; the baseline is libsndfile. `apart`
is the largest difference between the two, full scale is 1, and `samples` how many the one finds more than the other.
"""

import argparse
import io
import time
from collections.abc import Callable

import av
import numpy as np
import soundfile

from pipeline.dataset.sound_decoders import ContainerStream
from pipeline.dataset.sound_formats import identify

RATE_HZ, SECONDS = 48_000, 10
FORMATS = {
    "WAV, 16 bits": ("WAV", "PCM_16", "wav"),
    "FLAC, 16 bits": ("FLAC", "PCM_16", "flac"),
    "MP3": ("MP3", "MPEG_LAYER_III", "mp3"),
    "Ogg Vorbis": ("OGG", "VORBIS", "ogg"),
    "Ogg Opus": ("OGG", "OPUS", "ogg"),
}
"""Name → libsndfile's container and coding, FFmpeg's container."""


def sounds(samples: int) -> np.ndarray:
    """Make stereo noise whose loudness changes, as that of sounds does: (samples, 2), float32."""
    rng = np.random.default_rng(0)
    loudness = np.interp(np.arange(samples), np.linspace(0, samples, 50), 10 ** rng.uniform(-3, -0.7, 50))
    noise = np.cumsum(rng.standard_normal((samples, 2)), axis=0)  # less of the high frequencies
    noise -= np.stack([np.convolve(channel, np.full(999, 1 / 999), "same") for channel in noise.T], axis=1)
    return (0.2 * loudness[:, None] * noise / noise.std()).astype(np.float32)


def by_sndfile(data: bytes) -> np.ndarray:
    """Decode with libsndfile: (samples, channels), float32."""
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


def by_ffmpeg(data: bytes, demuxer: str) -> np.ndarray:
    """Decode with FFmpeg's libraries as the product calls them, Opus with libopus: (samples, channels), float32."""
    with ContainerStream(data=data, demuxer=demuxer).open(None) as decoding:
        return np.concatenate(list(decoding.blocks))


def by_own_opus(data: bytes) -> np.ndarray:
    """Decode Opus with FFmpeg's own decoder: (samples, channels), float32."""
    with av.open(io.BytesIO(data)) as container:
        context = av.CodecContext.create("opus", "r")
        context.extradata = container.streams.audio[0].codec_context.extradata
        frames = [frame for packet in container.demux() for frame in context.decode(packet)]  # pyright: ignore
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1).T


def by_product(data: bytes) -> np.ndarray:
    """Decode as the product does, which looks first at how much is there: (samples, channels), float32."""
    with identify(data).streams[0].open(None) as decoding:
        return np.concatenate(list(decoding.blocks))


def speed_of(decode: Callable[[bytes], np.ndarray], data: bytes, repeats: int) -> float:
    """Seconds of audio per second of one core's time."""
    best = min(_cpu_seconds(decode, data) for _ in range(repeats))
    return SECONDS / best


def _cpu_seconds(decode: Callable[[bytes], np.ndarray], data: bytes) -> float:
    start = time.process_time()
    decode(data)
    return time.process_time() - start


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    print("| format | decoder | speed, s/s | x libsndfile | apart | samples |\n|---|---|---:|---:|---:|---:|")
    for name, (container, coding, demuxer) in FORMATS.items():
        stream = io.BytesIO()
        soundfile.write(stream, sounds(RATE_HZ * SECONDS), RATE_HZ, format=container, subtype=coding)
        data = stream.getvalue()
        wanted, baseline = by_sndfile(data), speed_of(by_sndfile, data, repeats)
        decoders = {"libsndfile": by_sndfile, "FFmpeg": lambda data, demuxer=demuxer: by_ffmpeg(data, demuxer)}
        if coding == "OPUS":
            decoders["FFmpeg's own Opus"] = by_own_opus
        for decoder, decode in (decoders | {"as the product does": by_product}).items():
            found = decode(data)
            both = min(len(found), len(wanted))
            apart = np.abs(found[:both] - wanted[:both]).max()
            speed = speed_of(decode, data, repeats)
            print(f"| {name} | {decoder} | {speed:,.0f} | {speed / baseline:.2f} | {apart:.0e} |", end="")
            print(f" {len(found) - len(wanted):+d} |", flush=True)


if __name__ == "__main__":
    main()
