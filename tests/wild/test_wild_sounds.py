"""Sounds as bug reports and damaged headers have them: each is heard whole, or refused with its reason.

A new one is a line in `MADE`, or in `REPORTED` if it is a file beside the checkout.
"""

import io
import struct
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import CANCEL_OUT, LONGER, SHORTER, decode, inspect_sound
from pipeline.dataset.ogg import with_serial_number
from pipeline.errors import DecodeError

REPORTED_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "cases"
REPORTED = {
    "01-vbr-mp3-without-xing/noise_first.mp3": (442_368, 44_100),
    "01-vbr-mp3-without-xing/sil_first.mp3": (442_368, 44_100),
    "01-vbr-mp3-without-xing/sample.mp3": (481_536, 48_000),
    "05-concatenated-streams/chain.ogg": (529_200, 44_100),
    "05-concatenated-streams/chain.opus": (576_000, 48_000),
    "13-ogg-variants-refused/oggflac.oga": (132_300, 22_050),
    "13-ogg-variants-refused/tail.ogg": (264_600, 44_100),
    "16-small-things/e.wav": (264_600, 44_100),
    "16-small-things/f.mp3": (264_600, 44_100),
}
"""File → samples of a channel, rate in Hz."""

SAMPLES, RATE = 12_000, 16_000
ID3 = b"ID3\x04\0\0\0\0\x02\0" + b"\xff\xfb\x90\0" * 64
TAIL = b"TAG" + bytes(125)


@cache
def sound(kind: str, number: int = 0, channels: int = 1) -> bytes:
    """A whole sound of a kind; each number is another one."""
    samples = noise(SAMPLES, channels, number)
    container, _, codec = kind.partition(" ")
    if container.isupper():
        return by_sndfile(samples, 48_000 if codec == "OPUS" else RATE, container, codec or None)
    rate = 48_000 if codec == "libopus" else RATE
    return by_ffmpeg(samples, rate, container, codec, options={"write_xing": "0"} if container == "mp3" else {})


def patched(data: bytes, place: int | bytes, spelling: str, *numbers: float) -> bytes:
    """The file with other numbers at a place, or behind a mark."""
    start = place if isinstance(place, int) else data.index(place) + len(place)
    return data[:start] + struct.pack(spelling, *numbers) + data[start + struct.calcsize(spelling) :]


def ogg_patched(data: bytes, page: int, place: int, spelling: str, *numbers: int) -> bytes:
    """The file with other numbers in the header of a page, counted from the end if negative; checksums are right."""
    starts = [start for start in range(len(data)) if data.startswith(b"OggS", start)]
    return with_serial_number(patched(data, starts[page] + place, spelling, *numbers), 1)


def all_granules(data: bytes, granule: int) -> bytes:
    for page in range(data.count(b"OggS")):
        data = ogg_patched(data, page, 6, "<q", granule)
    return data


def frames_of(data: bytes, first: int, last: int, size: int = 1440) -> bytes:
    return data[first * size : last * size]


def backwards(flac: bytes) -> bytes:
    """The file with its last frame before its first, and none between."""
    opened: Any = av.open(io.BytesIO(flac))
    with opened as container:
        frames = [bytes(packet) for packet in container.demux() if packet.size]
    return flac[: flac.index(frames[0])] + frames[-1] + frames[0]


WAV, RF64, W64, AIFF, AU, CAF = (sound(f"{name} PCM_16") for name in ("WAV", "RF64", "W64", "AIFF", "AU", "CAF"))
FLAC, VORBIS, OPUS = sound("FLAC PCM_16"), sound("OGG VORBIS"), sound("OGG OPUS")
LAME, MP3, MP2 = sound("MP3 MPEG_LAYER_III"), sound("mp3 libmp3lame"), sound("mp2 mp2")
ADTS, SEVERAL_PAGES = sound("adts aac"), by_sndfile(noise(150_000), 48_000, "OGG", "OPUS")
LEFT, TEN = noise(SAMPLES), sound("OGG VORBIS", 0, 10)
MADE: dict[str, tuple[bytes, list[bytes] | str, tuple[str, ...]]] = {
    # joined
    "chained Vorbis": (VORBIS + sound("OGG VORBIS", 1), [VORBIS, sound("OGG VORBIS", 1)], ()),
    "chained Opus": (OPUS + sound("OGG OPUS", 1), [OPUS, sound("OGG OPUS", 1)], ()),
    "joined MP3": (LAME + sound("MP3 MPEG_LAYER_III", 1), [LAME, sound("MP3 MPEG_LAYER_III", 1)], ()),
    "joined WAV": (WAV + sound("WAV PCM_16", 1), [WAV, sound("WAV PCM_16", 1)], ()),
    "joined MP4": (2 * sound("mp4 aac"), 2 * [sound("mp4 aac")], ()),
    "joined WebM": (2 * sound("webm libopus"), 2 * [sound("webm libopus")], ()),
    # around the sound
    "a tag before RIFF": (ID3 + WAV, [WAV], ()),
    "a tag behind Ogg": (VORBIS + TAIL, [VORBIS], ()),
    "a tag behind Opus": (OPUS + TAIL, [OPUS], ()),
    "zeros before MP3": (bytes(4_000) + MP3, [MP3], ()),
    "junk before MP3": (b"\xff\xfbjunk\xff" * 300 + MP3, [MP3], ()),
    "FLAC in Ogg": (sound("ogg flac"), [by_sndfile(LEFT, RATE, "FLAC", "PCM_16")], ()),
    # the length in the header
    "WAV that was written into a pipe": (patched(WAV, b"data", "<I", 2**32 - 1), [WAV], ()),
    "WAV that was never finished": (patched(WAV, b"data", "<I", 0), [WAV], ()),
    "WAV that promises a tenth": (patched(WAV, b"data", "<I", SAMPLES // 5), [WAV], (LONGER,)),
    "RF64 that promises more": (patched(RF64, 28, "<Q", 2**40), [RF64], (SHORTER,)),
    "FLAC that promises a tenth": (patched(FLAC, 21, ">BI", 0xF0, SAMPLES // 10), [FLAC], (LONGER,)),
    "FLAC that promises more": (patched(FLAC, 21, ">BI", 0xF0, 9 * SAMPLES), [FLAC], (SHORTER,)),
    "Opus of a lower rate": (patched(OPUS, OPUS.index(b"OpusHead") + 12, "<I", 8_000), "corrupt stream", ()),
    "Opus that was made of 16 kHz": (ogg_patched(OPUS, 0, 28 + 12, "<I", 16_000), [OPUS], ()),
    "Opus that was made of nothing": (ogg_patched(OPUS, 0, 28 + 12, "<I", 0), [OPUS], ()),
    "Vorbis that is to end at once": (ogg_patched(VORBIS, -1, 6, "<q", 7), "contradictory length", ()),
    "Vorbis whose pages say nothing of an end": (all_granules(VORBIS, 0), "contradictory length", ()),
    "Opus whose pages say nothing of an end": (all_granules(OPUS, 0), "contradictory length", ()),
    "FLAC in Ogg that says nothing of an end": (all_granules(sound("ogg flac"), 0), "contradictory length", ()),
    "FLAC whose last frame stands before its first": (backwards(FLAC), "corrupt stream", ()),
    # other numbers in the header
    "a rate beyond all": (patched(WAV, 24, "<I", 2**31), "implausible sample rate", ()),
    "a rate beyond all in Wave64": (patched(W64, 68, "<I", 2**32 - 1), "implausible sample rate", ()),
    "a rate beyond all in AU": (patched(AU, 16, ">I", 2**32 - 1), "implausible sample rate", ()),
    "a rate that is no number in CAF": (patched(CAF, b"desc" + bytes(7) + b"\x20", ">d", np.nan), "implausible", ()),
    "no rate": (patched(WAV, 24, "<I", 0), "implausible sample rate", ()),
    "no channel": (patched(WAV, 22, "<H", 0), "implausible channel count", ()),
    "more channels than a sample has room for": (patched(WAV, 22, "<H", 2), "contradictory header", ()),
    "more bits than a sample has room for": (patched(WAV, 34, "<H", 32), "contradictory header", ()),
    "24 bits in 32": (patched(sound("WAV PCM_24"), 32, "<H", 4), "contradictory header", ()),
    "less bits than a sample has in CAF": (patched(CAF, 48, ">I", 8), "contradictory header", ()),
    "samples that begin within the header": (patched(AU, 4, ">I", 0), "unreadable header", ()),
    "samples that begin behind the file": (patched(AU, 4, ">I", 10**6), "no samples", ()),
    # frames
    "a lost frame near the beginning of MP3": (
        frames_of(MP2, 0, 1) + bytes(3_000) + frames_of(MP2, 1, 99),
        "corrupt stream",
        (),
    ),
    "two frames, then what is none": (frames_of(MP2, 0, 2) + bytes(700) + frames_of(MP2, 3, 99), "corrupt stream", ()),
    "a first frame of another kind, said to be longer": (
        patched(ADTS, 3, ">B", 1),
        [ADTS[ADTS.index(b"\xff\xf1", 1) :]],
        (),
    ),
    "a page in the middle that is to begin a stream": (
        ogg_patched(SEVERAL_PAGES, -1, 5, "<B", 2),
        "corrupt stream",
        (),
    ),
    "a cut first frame": (MP2[100:], [MP2[1440:]], ()),
    # channels and values
    "channels that cancel out": (by_sndfile(np.hstack([LEFT, -LEFT]), RATE, "WAV", "FLOAT"), "silence", (CANCEL_OUT,)),
    "a sample that is no number": (
        by_sndfile(LEFT * np.float32(np.nan), RATE, "WAV", "FLOAT"),
        "non-finite samples",
        (),
    ),
    "an infinite sample": (by_sndfile(LEFT * np.inf, RATE, "AIFF", "DOUBLE"), "non-finite samples", ()),
    "five channels and one": (sound("WAV PCM_16", 0, 6), [by_sndfile(noise(SAMPLES, 6).mean(1), RATE)], ()),
    "eight channels of QuickTime": (
        sound("mov pcm_s16le", 0, 8),
        [by_sndfile(noise(SAMPLES, 8).mean(1), RATE)],
        (),
    ),
    "ten channels of Vorbis": (TEN, [by_sndfile(soundfile.read(io.BytesIO(TEN))[0].mean(1), RATE, "WAV", "FLOAT")], ()),
    "192 kHz": (by_sndfile(LEFT, 192_000, "WAV", "PCM_24"), [by_sndfile(LEFT, 192_000, "FLAC", "PCM_24")], ()),
}
"""What it is → the file; the files that it sounds like, one after the other, or why not; what is noted."""


@pytest.mark.parametrize("case", MADE)
def test_a_sound_is_heard_whole_or_there_is_a_reason(case: str) -> None:
    data, wanted, notes = MADE[case]
    if isinstance(wanted, str) and wanted != "silence":
        for read in (inspect_sound, decode):
            with pytest.raises(DecodeError, match=wanted):
                read(data)
        return
    assert inspect_sound(data).notes == notes
    heard = decode(data).samples
    parts = [decode(part).samples for part in wanted] if isinstance(wanted, list) else [np.zeros(SAMPLES)]
    np.testing.assert_allclose(heard, np.concatenate(parts), atol=2**-14)


@pytest.mark.parametrize("file", REPORTED)
def test_a_reported_sound_is_heard_whole(file: str) -> None:
    path = REPORTED_FOLDER / file
    if not path.exists():
        pytest.skip(f"the reported sounds ../shared/cases/{file} are not beside this checkout")
    facts = inspect_sound(path.read_bytes())
    assert (facts.frames, facts.sample_rate_hz) == REPORTED[file]
