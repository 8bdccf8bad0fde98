import io
from typing import Any

import av
import numpy as np
import pytest
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import decode, inspect_sound
from pipeline.dataset.sound_decoders import ContainerStream, FrameStream, RawPcm, SndfileStream, checked_channels
from pipeline.errors import DecodeError

WAV = by_sndfile(noise(3_000), 16_000)


def heard(stream: Any) -> np.ndarray:
    with stream.open(None) as decoding:
        return np.concatenate(list(decoding.blocks))


def test_libsndfile_that_gives_another_number_of_samples_is_a_reason() -> None:
    with pytest.raises(DecodeError, match="contradictory length: 3000 samples decode, but 3100 are there"):
        heard(SndfileStream(data=WAV, samples=3_100))
    with pytest.raises(DecodeError, match="unreadable header"):
        heard(SndfileStream(data=b"no sound at all", samples=1))
    raw = RawPcm(subtype="NO_SUCH", endian="LITTLE", sample_rate_hz=16_000, channels=1, start=0, end=9)
    with pytest.raises(DecodeError, match="unreadable header"):
        heard(SndfileStream(data=bytes(9), samples=9, raw=raw))


def test_a_header_that_libsndfile_reads_otherwise_is_passed_over() -> None:
    raw = RawPcm(subtype="PCM_16", endian="BIG", sample_rate_hz=8_000, channels=1, start=44, end=len(WAV))
    with SndfileStream(data=WAV, samples=3_000, raw=raw).open(None) as decoding:
        swapped = np.frombuffer(WAV[44:], ">i2") / np.float32(2**15)
        assert decoding.sample_rate_hz == 8_000
        np.testing.assert_array_equal(np.concatenate(list(decoding.blocks))[:, 0], swapped)


def test_frames_that_are_not_all_decoded_are_a_reason() -> None:
    data = by_ffmpeg(noise(9_000), 16_000, "mp2", "mp2")
    whole = FrameStream(data=data, codec="mp2float", packets=[(0, len(data), 8)])
    assert heard(whole).shape == (8 * 1152, 1)
    with pytest.raises(DecodeError, match="contradictory length: 8 of 9 frames at byte 0 decode"):
        heard(FrameStream(data=data, codec="mp2float", packets=[(0, len(data), 9)]))
    with pytest.raises(DecodeError, match="no samples"):
        heard(FrameStream(data=data, codec="mp2float", packets=[]))


def test_a_container_without_sound_is_no_sound() -> None:
    stream = io.BytesIO()
    output: Any = av.open(stream, "w", format="mp4")
    with output:
        picture = output.add_stream("mpeg4", rate=25)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        output.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        output.mux(picture.encode(None))
    with pytest.raises(DecodeError, match="no audio: no stream of the mp4 file is sound"):
        inspect_sound(stream.getvalue())


def test_a_container_that_cant_be_opened_is_a_reason() -> None:
    with pytest.raises(DecodeError, match="unreadable header"):
        heard(ContainerStream(data=b"\x1a\x45\xdf\xa3 and nothing else", demuxer="matroska"))


def test_an_end_cuts_the_last_packet_and_no_more() -> None:
    data = by_sndfile(noise(12_000), 16_000, "OGG", "VORBIS")
    assert len(heard(ContainerStream(data=data, demuxer="ogg", end=11_999))) == 11_999
    with pytest.raises(DecodeError, match=r"contradictory length: \d+ samples decode, but the end is behind 5000"):
        heard(ContainerStream(data=data, demuxer="ogg", end=5_000))
    with pytest.raises(DecodeError, match=r"contradictory length: \d+ samples decode, but 20000 are there"):
        heard(ContainerStream(data=data, demuxer="ogg", least=20_000))


def test_a_damaged_packet_of_flac_is_found_in_any_container() -> None:
    data = bytearray(by_ffmpeg(noise(30_000), 16_000, "matroska", "flac"))
    data[len(data) // 2] ^= 16
    with pytest.raises(DecodeError, match="corrupt stream: flac"):
        inspect_sound(bytes(data))


@pytest.mark.parametrize("channels", [7, 8, 9, 16])
def test_as_many_channels_are_heard_as_there_are(channels: int) -> None:
    samples = noise(6_000, channels)
    data = by_sndfile(samples, 48_000, "OGG", "VORBIS")
    assert inspect_sound(data).channels == channels
    assert np.corrcoef(decode(data).samples, samples.mean(axis=1))[0, 1] > 0.8


@pytest.mark.parametrize("channels", [0, 65])
def test_channels_that_no_sound_has_are_refused(channels: int) -> None:
    with pytest.raises(DecodeError, match=f"implausible channel count: {channels}"):
        checked_channels(channels)
