import io

import numpy as np
import pytest
import soundfile
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import LONGER, SHORTER, decode, inspect_sound
from pipeline.dataset.sound_frames import frame_streams
from pipeline.errors import DecodeError

ID3 = b"ID3\x04\0\0\0\0\x02\0" + b"\xff\xfb\x90\0" * 64
"""A tag that holds what looks like frames' headers."""
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (64).to_bytes(4, "little") + b"\0\0\0\0\0\0\0\xa0" + bytes(8 + 64)


def mp3(seconds: float = 1.0, rate: int = 16_000, seed: int = 0, **options: str) -> bytes:
    return by_ffmpeg(noise(round(seconds * rate), 1, seed), rate, "mp3", "libmp3lame", options=options)


def without_note(seconds: float = 1.0) -> bytes:
    """An MP3 whose encoder didn't write beforehand how long it is."""
    return mp3(seconds, write_xing="0", id3v2_version="0")


def starts_of(data: bytes) -> list[int]:
    """Where the frames of an MP3 without tags begin."""
    starts = [start for stream in frame_streams(data) for start, _, _ in stream.packets]
    streams = frame_streams(data)
    assert len(starts) == 1, "give fewer frames than a packet has"
    end, frames = streams[0].packets[0][1:]
    assert (end - starts[0]) % frames == 0, "give a constant bit rate without padding"
    return list(range(starts[0], end, (end - starts[0]) // frames))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_variable_bit_rate_without_a_frame_count_is_heard_to_the_end(rate: int) -> None:
    quiet_then_loud = noise(2 * rate)
    quiet_then_loud[:rate] = 0
    quality = {"global_quality": "472", "flags": "qscale"}  # as `-q:a 4`
    data = by_ffmpeg(quiet_then_loud, rate, "mp3", "libmp3lame", codec_options=quality, options={"write_xing": "0"})
    frames = inspect_sound(data).frames
    assert frames % 576 == 0
    assert 0 <= frames - 2 * rate < 4 * 1152
    heard = decode(data).samples
    assert np.abs(heard[: rate // 2]).max() < 1e-3
    assert np.std(heard[-rate // 2 :]) > 0.1


@pytest.mark.parametrize("channels", [1, 2])
def test_gapless_data_gives_the_very_samples_that_were_encoded(channels: int) -> None:
    samples = noise(30_001, channels)
    data = by_ffmpeg(samples, 44_100, "mp3", "libmp3lame", codec_options={"b": "256k"})
    assert inspect_sound(data).frames == 30_001
    heard, wanted = decode(data).samples, samples.mean(axis=1)
    assert np.corrcoef(heard, wanted)[0, 1] > 0.9
    assert np.corrcoef(heard[1:], wanted[:-1])[0, 1] < 0.5  # not even one sample late


def test_tags_and_junk_around_the_frames_change_no_sample() -> None:
    data = without_note()
    wanted = decode(data).samples
    for wrapped in (ID3 + data, ID3 + ID3 + data, bytes(4096) + data, b"\x01junk\xff\xfb" * 99 + data, data + ID3V1):
        np.testing.assert_array_equal(decode(wrapped).samples, wanted)
    for wrapped in (data + APE + ID3V1, data + b"\xa5" * 999, ID3 + data + APE):
        np.testing.assert_array_equal(decode(wrapped).samples, wanted)


def test_a_stream_cut_within_a_frame_gives_the_whole_frames() -> None:
    data = without_note()
    starts = starts_of(data)
    beginning_lost = data[starts[1] - 100 :]
    assert inspect_sound(beginning_lost).frames == 576 * (len(starts) - 1)
    end_lost = data[: starts[-1] + 100]
    assert inspect_sound(end_lost).frames == 576 * (len(starts) - 1)
    np.testing.assert_array_equal(decode(end_lost).samples, decode(data).samples[: 576 * (len(starts) - 1)])


def test_a_stream_cut_long_before_its_encoder_said_is_refused() -> None:
    data = mp3(2.0)
    with pytest.raises(DecodeError, match=r"cut short: \d+ of \d+ samples are there"):
        inspect_sound(data[: len(data) * 6 // 10])


def test_a_wrong_count_of_frames_is_not_believed_but_noted() -> None:
    data = bytearray(mp3(2.0))
    place = data.index(b"Info") + 8
    frames = int.from_bytes(data[place : place + 4], "big")
    data[place : place + 4] = (frames // 2).to_bytes(4, "big")
    facts = inspect_sound(bytes(data))
    assert facts.notes == (LONGER,)
    assert facts.frames >= 2 * 16_000
    data[place : place + 4] = (2 * frames).to_bytes(4, "big")
    facts = inspect_sound(bytes(data))
    assert facts.notes == (SHORTER,)
    assert facts.frames >= 2 * 16_000


def test_joined_streams_are_heard_one_after_the_other_each_without_its_padding() -> None:
    first, second = mp3(1.0, seed=1), mp3(0.7, seed=2)
    assert inspect_sound(first + second).frames == 16_000 + 11_200
    np.testing.assert_array_equal(
        decode(first + ID3V1 + second).samples, np.concatenate([decode(first).samples, decode(second).samples])
    )


def test_joined_streams_of_several_rates_are_refused() -> None:
    with pytest.raises(DecodeError, match="several sample rates: 16000 and 22050 Hz"):
        inspect_sound(mp3() + mp3(rate=22_050))


def test_mono_and_stereo_may_be_joined() -> None:
    stereo = by_ffmpeg(noise(16_000, 2), 16_000, "mp3", "libmp3lame")
    joined = decode(mp3() + stereo).samples
    np.testing.assert_array_equal(joined, np.concatenate([decode(mp3()).samples, decode(stereo).samples]))


def test_a_hole_in_the_middle_is_refused_and_one_lost_frame_is_not() -> None:
    data = without_note(3.0)
    middle = len(data) // 2
    with pytest.raises(DecodeError, match=r"corrupt stream: \d+ bytes behind the first frame, at 0, are no frames"):
        inspect_sound(data[:middle] + bytes(500) + data[middle + 500 :])
    whole = inspect_sound(data).frames
    damaged = bytearray(data)
    stream = frame_streams(data)[0]
    start = stream.packets[0][1]  # a frame in the middle
    damaged[start] = 0
    assert inspect_sound(bytes(damaged)).frames == whole - 576


def test_a_file_whose_second_half_is_zeros_is_refused() -> None:
    data = without_note(12.0)
    with pytest.raises(DecodeError, match="corrupt stream"):
        inspect_sound(data[: len(data) // 2] + bytes(len(data) // 2))


def test_frames_that_begin_behind_more_junk_than_there_is_sound_are_none() -> None:
    data = without_note()
    with pytest.raises(DecodeError, match="not audio"):
        inspect_sound(bytes(20_000) + data)


def test_random_bytes_hold_no_frames() -> None:
    for seed in range(20):
        with pytest.raises(DecodeError, match="not audio"):
            frame_streams(np.random.default_rng(seed).bytes(50_000))


@pytest.mark.parametrize("layer", ["mp2", "libmp3lame"])
def test_another_decoder_hears_the_same(layer: str) -> None:
    samples = noise(30_000, 2)
    data = by_ffmpeg(samples, 44_100, "mp2" if layer == "mp2" else "mp3", layer)
    ours, theirs = decode(data).samples, soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1)
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_layer_one_is_read() -> None:
    header = b"\xff\xff\x44\xc0"  # MPEG 1, layer I, 128 kbit/s, 48 kHz, mono
    data = (header + bytes(12 * 128_000 // 48_000 * 4 - 4)) * 20
    facts = inspect_sound(data)
    assert (facts.format, facts.sample_rate_hz, facts.frames) == ("mp3", 48_000, 20 * 384)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_aac_in_adts_is_heard_frame_by_frame(rate: int) -> None:
    data = by_ffmpeg(noise(20_000, 2), rate, "adts", "aac")
    facts = inspect_sound(data)
    assert (facts.format, facts.sample_rate_hz, facts.channels) == ("aac", rate, 2)
    assert facts.frames == 1024 * (20_000 // 1024 + 2)  # the encoder's own frame, and one to fill up
    wanted = decode(data).samples
    np.testing.assert_array_equal(decode(ID3 + data + ID3V1).samples, wanted)
    assert len(decode(data + data).samples) == 2 * len(wanted)
    assert inspect_sound(data[:-10]).frames == facts.frames - 1024


def test_libsndfiles_own_mp3s_have_a_count_that_is_right() -> None:
    samples = noise(40_000, 1)
    facts = inspect_sound(by_sndfile(samples, 44_100, "MP3"))
    assert (facts.frames, facts.notes) == (40_000, ())


def test_fraunhofers_note_counts_as_xings_without_gapless_data() -> None:
    data = without_note()
    start = starts_of(data)[1] - starts_of(data)[0]
    frame = bytearray(data[:start])
    frame[4:] = bytes(start - 4)
    frame[36:54] = b"VBRI\0\1" + bytes(8) + (2 * len(starts_of(data))).to_bytes(4, "big")
    facts = inspect_sound(bytes(frame) + data)
    assert facts.frames == 576 * len(starts_of(data))
    assert facts.notes == (SHORTER,)


def test_a_count_by_an_encoder_whose_gapless_data_is_not_known_costs_no_sample() -> None:
    data = mp3(1.0)
    unknown = data.replace(b"LAME", b"XXXX").replace(b"Lavf", b"XXXX").replace(b"Lavc", b"XXXX")
    assert inspect_sound(unknown).frames % 576 == 0
    assert inspect_sound(unknown).frames > 16_000
