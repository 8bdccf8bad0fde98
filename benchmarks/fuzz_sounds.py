"""What is damaged of sounds, and what has to hold of them: `benchmarks/fuzz.py` does the rest.

Damage goes where structure is: lengths, counts, rates and flags in the headers of files, chunks, pages, frames, boxes
and elements, under checksums that are right again. Of a damaged file, either all that FFmpeg finds in it is heard, or
there is a reason, or a note that its header promises more.
"""

import io
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from pipeline.dataset.audio import SHORTER, SoundFacts, decode, inspect_sound
from pipeline.dataset.ogg import with_serial_number
from pipeline.dataset.sound_decoders import SndfileStream
from pipeline.dataset.sound_formats import identify
from pipeline.errors import DecodeError

RATE_HZ, SAMPLES = 16_000, 12_000
BETWEEN_COUNTS = 3 * 1_152
"""Samples: FFmpeg hears a frame that was cut, and the delay of a second stream."""
SNDFILE = {
    "wav": (("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAVEX", "FLOAT"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_16")),
    "w64": (("W64", "PCM_16"),),
    "aiff": (("AIFF", "PCM_16"), ("AIFF", "FLOAT")),
    "caf": (("CAF", "PCM_16"), ("CAF", "ALAC_16")),
    "au": (("AU", "PCM_16"), ("AU", "ULAW")),
    "flac": (("FLAC", "PCM_16"), ("FLAC", "PCM_24")),
    "ogg": (("OGG", "VORBIS"), ("OGG", "OPUS")),
    "mp3": (("MP3", None),),
}
"""What is fuzzed → libsndfile's containers and codings."""
FFMPEG = {
    "ogg": (("ogg", "flac", {}),),
    "mp3": (("mp3", "libmp3lame", {"write_xing": "0"}), ("mp2", "mp2", {}), ("adts", "aac", {})),
    "mp4": (("ipod", "aac", {}), ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}), ("mov", "pcm_s16le", {})),
    "webm": (("webm", "libopus", {}), ("matroska", "aac", {}), ("matroska", "flac", {})),
}
"""What is fuzzed → FFmpeg's containers, codecs, and options."""
MAX_SAMPLES = 100 * RATE_HZ
BYTES_OF_A_SAMPLE = {"pcm_u8": 1, "pcm_s8": 1, "pcm_mulaw": 1, "pcm_alaw": 1} | {
    f"pcm_{kind}{bits}{order}": bits // 8 for kind in "sf" for bits in (16, 24, 32, 64) for order in ("le", "be")
}
SOUND_TOKENS = (b"RIFF", b"data", b"OggS", b"fLaC", b"\xff\xfb", b"moov", b"\xff" * 8, bytes(8), b"TAG" + bytes(125))
BOXES_IN_BOXES = frozenset((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex"))


def sound_files() -> dict[str, list[bytes]]:
    """Make the files that damage begins with: name of the target → files."""
    files: dict[str, list[bytes]] = {}
    rng = np.random.default_rng(0)
    for target, kinds in SNDFILE.items():
        for number, (container, coding) in enumerate(kinds):
            stream = io.BytesIO()
            noise = (0.2 * rng.standard_normal((SAMPLES, 1 + number % 2))).astype(np.float32)
            soundfile.write(stream, noise, RATE_HZ, format=container, subtype=coding)
            files.setdefault(target, []).append(stream.getvalue())
    for target, kinds in FFMPEG.items():
        for container, codec, options in kinds:
            noise = (0.2 * rng.standard_normal((1, SAMPLES))).astype(np.float32)
            files.setdefault(target, []).append(_by_ffmpeg(noise, container, codec, options))
    return files


def _by_ffmpeg(noise: np.ndarray, container: str, codec: str, options: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    rate = 48_000 if codec == "libopus" else RATE_HZ
    output: Any = av.open(stream, "w", format=container, options={"fflags": "+bitexact", **options})
    with output:
        sound = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(sound.encode(piece))
    return stream.getvalue()


def damaged_header(target: str, data: bytes, dice: random.Random) -> bytes:
    """Put one to three wrong numbers where a file's structure stands."""
    damaged = bytearray(data)
    places = [(0, 64), *PLACES.get(target, _head)(data)]
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        start, reach = dice.choice(places)
        width = dice.choice((1, 1, 2, 2, 4, 4, 8))
        place = start + dice.randrange(max(1, reach - width + 1))
        if place + width > len(damaged):
            continue
        order = dice.choice(("little", "big"))
        old = int.from_bytes(damaged[place : place + width], order)
        number = _wrong_number(old, len(data), dice) & (1 << 8 * width) - 1
        damaged[place : place + width] = number.to_bytes(width, order)
    if dice.random() < 0.15:
        del damaged[dice.randrange(len(damaged)) :]
    if dice.random() < 0.1:
        damaged += data
    return _with_right_checksums(bytes(damaged)) if target == "ogg" and dice.random() < 0.9 else bytes(damaged)


def _wrong_number(old: int, length: int, dice: random.Random) -> int:
    small = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 63, 64, 65, 100, 127, 128, 255, 256))
    large = (1 << dice.choice((15, 16, 24, 31, 32, 63, 64))) - dice.choice((0, 1, 2, 16))
    near = old + dice.choice((-4, -2, -1, 1, 2, 4, 8, 100, -100))
    related = dice.choice((old * 2, old // 2, old * 3, length, length - 8, length // 2, length * 2))
    return abs(dice.choice((small, small, large, near, related, related, old ^ 1 << dice.randrange(16))))


def _head(data: bytes) -> Iterator[tuple[int, int]]:
    marks = [data.find(mark) for mark in (b"data", b"SSND", b"fmt ", b"COMM", b"desc", b"fact", b"ds64", b"pakt")]
    yield 0, 96
    yield from ((place, 40) for place in marks if place >= 0)


def _flac(data: bytes) -> Iterator[tuple[int, int]]:
    yield from ((0, 42),) * 4
    yield from ((place, 8) for place in _finds(data, b"\xff\xf8"))


def _ogg_pages(data: bytes) -> Iterator[tuple[int, int]]:
    yield from ((place, 80) for place in _finds(data, b"OggS"))


def _frames(data: bytes) -> Iterator[tuple[int, int]]:
    yield from ((0, 64),) * 4
    yield from ((place, 7) for place in _finds(data, data[:2] if data[0] == 0xFF else b"\xff\xf3"))


def _boxes(data: bytes) -> Iterator[tuple[int, int]]:
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        yield place, 8
        if kind in BOXES_IN_BOXES:
            place += 8
            continue
        if kind != b"mdat":
            yield from ((place + 8, min(size, 120)),) * 2
        place += max(8, size)


def _elements(data: bytes) -> Iterator[tuple[int, int]]:
    yield from ((0, 400),) * 3
    yield from ((place, 16) for mark in (b"\xa3", b"\xa0", b"\x1f\x43\xb6\x75") for place in _finds(data, mark))


PLACES: dict[str, Callable[[bytes], Iterator[tuple[int, int]]]] = {
    "flac": _flac,
    "ogg": _ogg_pages,
    "mp3": _frames,
    "mp4": _boxes,
    "webm": _elements,
}
"""What is fuzzed → (where structure stands, bytes of it)."""


def _finds(data: bytes, mark: bytes) -> Iterator[int]:
    place = data.find(mark)
    while place >= 0:
        yield place
        place = data.find(mark, place + 1)


def _with_right_checksums(ogg: bytes) -> bytes:
    try:
        return with_serial_number(ogg, 7)
    except DecodeError:
        return ogg


def read_sound(path: Path) -> str:
    """Read a sound as ingest and training do, and compare with what FFmpeg finds."""
    data = path.read_bytes()
    facts = inspect_sound(data)
    sound = decode(data)
    assert len(sound.samples) == facts.frames, f"{len(sound.samples)} samples once, {facts.frames} another time"
    assert np.isfinite(sound.samples).all(), "samples that are no numbers are let in"
    assert 0 < facts.frames <= 64 * 8 * len(data) + 2**17, f"{facts.frames} samples from {len(data)} bytes"
    begin = decode(data, max_seconds=0.05).samples
    assert 0 < len(begin) <= facts.frames, "the beginning is longer than the whole"
    missing = _ffmpeg_samples(data, facts) - facts.frames
    if missing > max(BETWEEN_COUNTS, 0.05 * facts.frames) and SHORTER not in facts.notes:
        raise AssertionError(f"{facts.frames} samples are heard in silence, and FFmpeg hears {missing} more")
    return f"{facts.format} {facts.channels} {facts.notes}"


def _ffmpeg_samples(data: bytes, facts: SoundFacts) -> int:
    """Count what FFmpeg decodes, left to itself; 0 where it gives up, or takes another number of bytes for a sample."""
    samples = 0
    raw = [stream.raw for stream in identify(data).streams if isinstance(stream, SndfileStream) and stream.raw]
    try:
        opened: Any = av.open(io.BytesIO(data))
        with opened as container:
            if not container.streams.audio:
                return 0
            for frame in container.decode(container.streams.audio[0]):
                samples += frame.samples * facts.sample_rate_hz // frame.sample_rate
                if samples > MAX_SAMPLES:
                    return 0
            name = container.streams.audio[0].codec_context.name
    except (av.FFmpegError, ValueError, IndexError):
        return 0
    is_other = (
        bool(raw) and BYTES_OF_A_SAMPLE.get(name) != (raw[0].end - raw[0].start) // facts.frames // facts.channels
    )
    return 0 if is_other else samples
