import io
from typing import Any

import av
import numpy as np
import pytest
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import LONGER, SHORTER, decode, inspect_sound
from pipeline.errors import DecodeError

SAMPLES = 30_000


def flac(channels: int = 1, samples: int = SAMPLES, subtype: str = "PCM_16", seed: int = 0) -> bytes:
    return by_sndfile(noise(samples, channels, seed), 32_000, "FLAC", subtype)


def with_count(data: bytes, samples: int) -> bytes:
    numbers = int.from_bytes(data[18:26], "big") >> 36 << 36 | samples
    return data[:18] + numbers.to_bytes(8, "big") + data[26:]


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("count", [0, 1, SAMPLES - 1, SAMPLES + 1, 10 * SAMPLES, 2**36 - 1])
def test_a_wrong_count_in_the_header_costs_no_sample(subtype: str, count: int) -> None:
    data = flac(2, subtype=subtype)
    np.testing.assert_array_equal(decode(with_count(data, count)).samples, decode(data).samples)


def test_a_wrong_count_is_noted_and_none_is_not() -> None:
    data = flac()
    assert inspect_sound(with_count(data, SAMPLES // 2)).notes == (LONGER,)
    assert inspect_sound(with_count(data, 2 * SAMPLES)).notes == (SHORTER,)
    assert inspect_sound(with_count(data, 0)).notes == ()


@pytest.mark.parametrize("chosen", [slice(0, 4), slice(3, None), slice(2, 5)])
def test_frames_that_were_copied_out_of_a_longer_stream_are_all_heard(chosen: slice) -> None:
    data = flac()
    copied = io.BytesIO()
    source: Any = av.open(io.BytesIO(data))
    target: Any = av.open(copied, "w", format="flac")  # as `ffmpeg -ss … -t … -c copy`
    with source, target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in [packet for packet in source.demux() if packet.size][chosen]:
            packet.stream = stream
            target.mux(packet)
    facts = inspect_sound(copied.getvalue())
    assert (facts.frames < SAMPLES, facts.notes) == (True, (SHORTER,))
    whole, heard = decode(data).samples, decode(copied.getvalue()).samples
    begin = 4_096 * (chosen.start or 0)
    np.testing.assert_array_equal(heard, whole[begin : begin + len(heard)])
    assert len(heard) == (SAMPLES - begin if chosen.stop is None else 4_096 * (chosen.stop - chosen.start))


@pytest.mark.parametrize("count", [None, 0])
def test_joined_streams_are_heard_one_after_the_other(count: int | None) -> None:
    first, second = flac(seed=1), flac(samples=SAMPLES, seed=2)  # of equal length, so that the counts agree
    wanted = np.concatenate([decode(first).samples, decode(second).samples])
    if count is not None:
        first = with_count(first, count)
    np.testing.assert_array_equal(decode(first + second).samples, wanted)
    assert len(decode(first + second + first).samples) == 3 * SAMPLES


def test_tags_before_and_behind_cost_no_sample() -> None:
    data = flac()
    tag = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
    for wrapped in (tag + data, data + b"TAG" + bytes(125), data + bytes(5000)):
        np.testing.assert_array_equal(decode(wrapped).samples, decode(data).samples)


@pytest.mark.parametrize("length", [1, 15, 16, 100, 4_095, 4_096, 4_097])
def test_streams_of_one_or_two_frames_are_read(length: int) -> None:
    assert inspect_sound(with_count(flac(samples=length), 0)).frames == length


@pytest.mark.parametrize("rate", [8_000, 11_025, 37_800, 44_100, 65_535, 96_000, 192_000, 655_350])
def test_every_rate_is_told_from_the_frames(rate: int) -> None:
    data = by_sndfile(noise(5_000), rate, "FLAC", "PCM_16")
    assert inspect_sound(with_count(data, 0)).frames == 5_000


def test_a_header_that_the_frames_contradict_is_refused() -> None:
    data = flac()
    numbers = int.from_bytes(data[18:26], "big")
    for flipped in (1 << 44, 1 << 41, 1 << 36):  # the lowest bits of rate, channels and bits
        with pytest.raises(DecodeError, match="its frames do not fit its header"):
            inspect_sound(data[:18] + (numbers ^ flipped).to_bytes(8, "big") + data[26:])


def test_a_stream_that_is_cut_or_damaged_is_refused() -> None:
    data = flac(2)
    for cut in (len(data) // 2, len(data) - 3):
        with pytest.raises(DecodeError, match="corrupt stream"):
            inspect_sound(data[:cut])
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 16
    with pytest.raises(DecodeError, match="corrupt stream"):
        inspect_sound(bytes(damaged))
    with pytest.raises(DecodeError, match="unreadable header"):
        inspect_sound(data[:30])
    with pytest.raises(DecodeError, match="no samples"):
        inspect_sound(data[:42])


def test_ffmpegs_flac_is_read_like_libsndfiles() -> None:
    samples = noise(SAMPLES, 2)
    np.testing.assert_allclose(
        decode(by_ffmpeg(samples, 32_000, "flac", "flac")).samples, samples.mean(axis=1), atol=2**-15
    )
