import struct

import numpy as np
import pytest
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import LONGER, SHORTER, decode, inspect_sound
from pipeline.errors import DecodeError

SAMPLES, RATE = 10_000, 32_000
SIZE_FIELDS = {
    "WAV": (b"data", 4, "<I", 0),
    "RF64": (b"ds64", 16, "<Q", 0),
    "W64": (b"data\xf3", 16, "<Q", 24),
    "AIFF": (b"SSND", 4, ">I", 8),
    "AU": (b".snd", 8, ">I", 0),
    "CAF": (b"data", 4, ">Q", 4),
}
"""Format → where the size of the samples stands: behind which mark, how far, how it is spelled, what it counts too."""
CODINGS = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "ALAW"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("W64", "FLOAT"),
    ("AIFF", "PCM_S8"),
    ("AIFF", "PCM_16"),
    ("AIFF", "PCM_24"),
    ("AIFF", "FLOAT"),
    ("AIFF", "DOUBLE"),
    ("AIFF", "ULAW"),
    ("AU", "PCM_16"),
    ("AU", "FLOAT"),
    ("AU", "ALAW"),
    ("CAF", "PCM_16"),
    ("CAF", "PCM_24"),
    ("CAF", "FLOAT"),
    ("CAF", "ULAW"),
]


def sound(format: str, subtype: str = "PCM_16", channels: int = 2, samples: int = SAMPLES, seed: int = 0) -> bytes:
    return by_sndfile(noise(samples, channels, seed), RATE, format, subtype)


def with_size(data: bytes, format: str, size: int) -> bytes:
    """The file with another statement of how many bytes of samples there are; -1 is all ones."""
    mark, behind, spelling, own = SIZE_FIELDS[format]
    place = data.index(mark) + behind
    most = 256 ** struct.calcsize(spelling) - 1
    stated = most if size < 0 else min(size + own, most)
    return data[:place] + struct.pack(spelling, stated) + data[place + struct.calcsize(spelling) :]


@pytest.mark.parametrize(("format", "subtype"), CODINGS)
@pytest.mark.parametrize("size", [-1, 3_000, 10**9])
def test_every_coding_is_heard_to_its_end_whatever_its_header_says(format: str, subtype: str, size: int) -> None:
    data = sound(format, subtype)
    wanted = decode(data).samples
    assert len(wanted) == SAMPLES
    field = "WAV" if format == "WAVEX" else format
    np.testing.assert_array_equal(decode(with_size(data, field, size)).samples, wanted)


@pytest.mark.parametrize("container", ["wav", "w64", "aiff", "caf", "au"])
@pytest.mark.parametrize("bits", [32, 64])
def test_floats_that_ffmpeg_wrote_are_heard_as_floats(container: str, bits: int) -> None:
    samples = noise(SAMPLES, 2)
    codec = f"pcm_f{bits}{'le' if container in ('wav', 'w64') else 'be'}"
    np.testing.assert_array_equal(decode(by_ffmpeg(samples, RATE, container, codec)).samples, samples.mean(axis=1))


@pytest.mark.parametrize("format", SIZE_FIELDS)
def test_a_header_that_is_wrong_about_the_length_is_noted(format: str) -> None:
    data = sound(format)
    assert inspect_sound(data).notes == ()
    too_short = inspect_sound(with_size(data, format, 4 * SAMPLES // 4))
    assert (too_short.frames, too_short.notes) == (SAMPLES, (LONGER,))
    too_long = inspect_sound(with_size(data, format, 40 * SAMPLES))
    assert (too_long.frames, too_long.notes) == (SAMPLES, (SHORTER,))
    for unknown in (0, -1):  # a recorder that writes into a pipe says so
        facts = inspect_sound(with_size(data, format, unknown))
        assert (facts.frames, facts.notes) == (SAMPLES, ())


@pytest.mark.parametrize("format", SIZE_FIELDS)
def test_what_stands_behind_the_samples_is_not_heard(format: str) -> None:
    data = sound(format)
    wanted = decode(data).samples
    for behind in (b"TAG" + bytes(125), bytes(9_999), b"\r\n", noise(50).tobytes()):
        np.testing.assert_array_equal(decode(data + behind).samples, wanted)


@pytest.mark.parametrize(("format", "order"), [("WAV", "<"), ("AIFF", ">")])
def test_chunks_behind_the_samples_are_not_heard_even_where_a_pad_byte_is_missing(format: str, order: str) -> None:
    data = sound(format, channels=1)
    if format == "WAV":  # an odd number of bytes
        data = by_sndfile(noise(SAMPLES + 1), RATE, format, "PCM_U8")[:-1]
        assert len(data) % 2
    wanted = decode(data).samples
    list_chunk = b"LIST" + struct.pack(f"{order}I", 5000) + b"adtl" + bytes(range(256)) * 19 + bytes(132)
    note_chunk = b"note" + struct.pack(f"{order}I", 3) + b"abc"
    for behind in (list_chunk, note_chunk, note_chunk + list_chunk, note_chunk + b"\0" + list_chunk):
        np.testing.assert_array_equal(decode(data + behind).samples, wanted)
        if len(data) % 2:
            np.testing.assert_array_equal(decode(data + b"\0" + behind).samples, wanted)
    np.testing.assert_array_equal(decode(data + list_chunk[:3000]).samples, wanted)


@pytest.mark.parametrize("format", SIZE_FIELDS)
@pytest.mark.parametrize("size", [None, -1])
def test_joined_files_are_heard_one_after_the_other(format: str, size: int | None) -> None:
    first, second = sound(format, seed=1), sound(format, samples=5_000, seed=2)
    wanted = np.concatenate([decode(first).samples, decode(second).samples])
    if size is not None:
        first, second = with_size(first, format, size), with_size(second, format, size)
    np.testing.assert_array_equal(decode(first + second).samples, wanted)


def test_id3_before_riff_costs_no_sample() -> None:
    data = sound("WAV")
    tag = b"ID3\x03\0\0\0\0\x0f\x76" + bytes(15 * 128 + 0x76)
    np.testing.assert_array_equal(decode(tag + data).samples, decode(data).samples)


def test_a_part_of_a_sample_at_the_end_is_dropped() -> None:
    data = sound("WAV")
    assert inspect_sound(data[:-1]).frames == SAMPLES - 1
    assert inspect_sound(with_size(data, "WAV", 4 * SAMPLES - 2)).frames == SAMPLES - 1


def test_mpeg_audio_in_a_wav_is_heard_frame_by_frame() -> None:
    mp3 = by_ffmpeg(noise(20_000), 16_000, "mp3", "libmp3lame", options={"write_xing": "0", "id3v2_version": "0"})
    header = struct.pack("<HHIIHHH12x", 0x55, 1, 16_000, 4_000, 1, 0, 12)
    data = b"WAVE" + b"fmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(mp3)) + mp3
    wav = b"RIFF" + struct.pack("<I", len(data)) + data
    np.testing.assert_array_equal(decode(wav).samples, decode(mp3).samples)


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_codings_in_blocks_are_heard_to_the_end_or_refused(subtype: str) -> None:
    data = sound("WAV", subtype, channels=1)
    whole = inspect_sound(data).frames
    assert 0 <= whole - SAMPLES < 1_100  # blocks are filled up
    for size in (-1, 0, 10**6):
        assert inspect_sound(with_size(data, "WAV", size)).frames == whole
    with pytest.raises(DecodeError, match=r"contradictory length: .* neither sound nor chunks"):
        inspect_sound(with_size(data, "WAV", 1024 if subtype != "GSM610" else 1040))
    with pytest.raises(DecodeError, match="cut short"):
        inspect_sound(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0", "unreadable header: it is cut"),
        (b"RIFF\xff\xff\xff\xffWAVEdata\x10\0\0\0" + bytes(16), "unreadable header: no fmt chunk"),
        (sound("WAV")[:36], "unreadable header: no data chunk"),
        (sound("AIFF")[:12], "unreadable header: no COMM chunk"),
        (sound("AIFF")[:38], "unreadable header: no SSND chunk"),
        (sound("CAF")[:8], "unreadable header: no desc chunk"),
        (sound("CAF")[:60], "unreadable header: no data chunk"),
        (sound("AU")[:20], "unreadable header: it is cut"),
        (sound("WAV")[:44], "no samples"),
    ],
)
def test_a_header_that_is_cut_is_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        inspect_sound(data)


@pytest.mark.parametrize("channels", [0, 65])
def test_implausible_channels_are_refused_before_anything_is_read(channels: int) -> None:
    data = bytearray(sound("WAV"))
    struct.pack_into("<H", data, 22, channels)
    with pytest.raises(DecodeError, match=f"implausible channel count: {channels}"):
        inspect_sound(bytes(data))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_big_endian_riff_is_read(subtype: str) -> None:
    width = 2 if subtype == "PCM_16" else 3
    samples = np.round(noise(1_000) * 2**15).astype(np.int64)[:, 0]
    payload = b"".join((int(value) << 8 * (width - 2)).to_bytes(width, "big", signed=True) for value in samples)
    header = struct.pack(">HHIIHH", 1, 1, RATE, RATE * width, width, 8 * width)
    data = b"RIFX" + struct.pack(">I", 36 + len(payload)) + b"WAVEfmt " + struct.pack(">I", 16) + header
    for size in (len(payload), 0, 2**32 - 1):
        file = data + b"data" + struct.pack(">I", size) + payload
        np.testing.assert_allclose(decode(file).samples, samples / 2**15, atol=1e-7)
