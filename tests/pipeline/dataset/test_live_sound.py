import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile

from pipeline.dataset.live_sound import LiveSound, RawFormat, SampleFormat
from pipeline.errors import DecodeError


@contextmanager
def piped(content: bytes, at_once: int = 1000) -> Iterator[int]:
    """A pipe that gets some bytes, piece by piece, and is closed then."""
    reading, writing = os.pipe()

    def feed() -> None:
        with os.fdopen(writing, "wb", buffering=0) as stream:
            for start in range(0, len(content), at_once):
                stream.write(content[start : start + at_once])

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


def hear(content: bytes, raw: RawFormat | None = None, at_once: int = 1000) -> tuple[int, np.ndarray]:
    with piped(content, at_once) as descriptor:
        sound = LiveSound(descriptor, raw)
        return sound.sample_rate_hz, np.concatenate([*sound.blocks(), np.empty(0, np.float32)])


@pytest.fixture
def stereo() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (5000, 2)).astype(np.float32)


def wav(samples: np.ndarray, subtype: str = "PCM_16", form: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, 22_050, format=form, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("at_once", [1, 777, 1 << 20])
def test_a_wav_stream_is_heard_as_its_file(stereo: np.ndarray, subtype: str, at_once: int) -> None:
    content = wav(stereo[: 300 if at_once == 1 else None], subtype)
    rate, heard = hear(content, at_once=at_once)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 22_050
    np.testing.assert_allclose(heard, expected.mean(axis=1), atol=1e-6)


def unknown(header: bytearray) -> None:
    header[40:44] = b"\xff\xff\xff\xff"


def arecords(header: bytearray) -> None:
    header[40:44] = (0x80000000 - 36).to_bytes(4, "little")


def zero(header: bytearray) -> None:
    header[40:44] = bytes(4)


def too_small(header: bytearray) -> None:
    header[40:44] = (400).to_bytes(4, "little")


@pytest.mark.parametrize("change", [unknown, arecords, zero, too_small])
def test_a_header_that_does_not_know_the_length_stops_nothing(
    stereo: np.ndarray, change: Callable[[bytearray], None]
) -> None:
    content = bytearray(wav(stereo))
    change(content)
    assert len(hear(bytes(content))[1]) == 5000


def test_chunks_behind_the_samples_are_no_sound(stereo: np.ndarray) -> None:
    content = wav(stereo) + b"LIST" + (300).to_bytes(4, "little") + bytes(300)
    assert len(hear(content)[1]) == 5000


RAW_FORMATS = {"s16le": "<i2", "s16be": ">i2", "s32le": "<i4", "f32le": "<f4", "f32be": ">f4", "u8": "u1", "s8": "i1"}


@pytest.mark.parametrize(("name", "dtype"), RAW_FORMATS.items())
def test_raw_samples_are_what_the_flags_say(stereo: np.ndarray, name: SampleFormat, dtype: str) -> None:
    scale = 1 if dtype[1] == "f" else 2 ** (8 * np.dtype(dtype).itemsize - 1) - 1
    raw = (stereo * scale + (128 if name == "u8" else 0)).astype(dtype)
    rate, heard = hear(raw.tobytes(), RawFormat(sample_rate_hz=8000, channels=2, sample_format=name))
    assert rate == 8000
    np.testing.assert_allclose(heard, stereo.mean(axis=1), atol=0.02)


def test_an_empty_or_foreign_stream_is_refused_and_the_flags_named(stereo: np.ndarray) -> None:
    for nothing, raw in ((b"", None), (wav(stereo[:0]), None), (b"", RawFormat(sample_rate_hz=8000))):
        with pytest.raises(DecodeError, match="empty stream"):
            hear(nothing, raw)
    with pytest.raises(DecodeError, match="--rate, --channels, --sample-format"):
        hear(bytes(100))
    with pytest.raises(DecodeError, match="header"):
        hear(wav(stereo)[:30])
