import io

import numpy as np
import pytest
import soundfile
from published_copies import RealClip, real_clips

from pipeline.dataset import sound_decoders
from pipeline.dataset.audio import decode, inspect_sound, resample
from pipeline.dataset.ogg import check_ogg
from pipeline.errors import DecodeError
from pipeline.ingest.transcoding import Transcoding


def encoded(samples: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


def transcode(audio: bytes, *settings: object) -> bytes:
    return Transcoding(*settings)(audio, inspect_sound(audio))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2])
def test_flac_loses_nothing_of_integers(subtype: str, channels: int) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (4000, channels))
    noise[:2] = [[-1.0] * channels, [1.0] * channels]  # full scale, both ends
    audio = encoded(noise, subtype=subtype)
    flac = transcode(audio, "flac")
    assert inspect_sound(flac).format == "flac"
    np.testing.assert_array_equal(
        soundfile.read(io.BytesIO(flac), dtype="int32")[0], soundfile.read(io.BytesIO(audio), dtype="int32")[0]
    )
    assert soundfile.info(io.BytesIO(flac)).subtype == ("PCM_24" if subtype == "PCM_24" else "PCM_16")


@pytest.mark.parametrize("extension", ["mp3", "ogg", "opus", "wav"])
def test_real_sounds_become_flac_within_half_a_step(extension: str) -> None:
    clip = real_clips(extension, 1)[0]
    before, after = decode(clip.audio), decode(transcode(clip.audio, "flac"))
    assert before.sample_rate_hz == after.sample_rate_hz
    np.testing.assert_allclose(after.samples, before.samples.clip(-1, 1 - 2**-15), atol=0.5001 * 2**-15)


def test_another_rate_is_what_the_resampler_gives_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound_decoders, "BLOCK_VALUES", 5000)  # many blocks
    clip = real_clips("wav", 1)[0]
    flac = decode(transcode(clip.audio, "flac", 32_000))
    before = decode(clip.audio)
    wanted = resample(before.samples, before.sample_rate_hz, 32_000)
    assert flac.sample_rate_hz == 32_000
    assert len(flac.samples) == len(wanted)
    np.testing.assert_allclose(flac.samples, wanted, atol=2**-15)


def test_what_overshoots_full_scale_is_cut_there_and_does_not_wrap() -> None:
    loud = transcode(encoded(np.array([0.0, 1.7, -1.7, 0.5]), subtype="FLOAT"), "flac")
    np.testing.assert_allclose(decode(loud).samples, [0, 1, -1, 0.5], atol=2**-22)


@pytest.mark.parametrize(
    ("own", "wanted", "rate"),
    [
        (8_000, None, 8_000),
        (22_050, None, 24_000),
        (32_000, None, 48_000),
        (96_000, None, 48_000),
        (8_000, 16_000, 16_000),
    ],
)
def test_opus_is_made_at_a_rate_that_the_codec_knows_and_plays_at_48_000(
    own: int, wanted: int | None, rate: int
) -> None:
    tone = 0.3 * np.sin(np.arange(own) * 2 * np.pi * 440 / own)
    opus = transcode(encoded(tone, own), "opus", wanted)
    facts = inspect_sound(opus)
    assert (facts.format, facts.sample_rate_hz, facts.frames) == ("opus", 48_000, 48_000)
    made_from = opus.index(b"OpusHead") + 12
    assert int.from_bytes(opus[made_from : made_from + 4], "little") == rate
    check_ogg(opus)
    tone = 0.3 * np.sin(np.arange(48_000) * 2 * np.pi * 440 / 48_000)
    middle = slice(12_000, 24_000)
    assert np.abs(decode(opus).samples[middle] - tone[middle]).max() < 0.03


@pytest.mark.parametrize("format", ["flac", "opus"])
def test_equal_sounds_give_equal_bytes(mp3s: list[RealClip], format: str) -> None:
    assert transcode(mp3s[0].audio, format) == transcode(mp3s[0].audio, format)


def test_a_sound_that_is_so_already_keeps_its_bytes(mp3s: list[RealClip]) -> None:
    flac = transcode(mp3s[0].audio, "flac")
    assert transcode(flac, "flac") is flac
    assert transcode(flac, "flac", 32_000) != flac


def test_channels_that_a_format_cannot_hold_are_a_reason() -> None:
    audio = encoded(np.zeros((100, 9)), 8_000)
    with pytest.raises(DecodeError, match="too many channels: 9; flac takes 8"):
        transcode(audio, "flac")
