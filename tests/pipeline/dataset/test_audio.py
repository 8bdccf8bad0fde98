import io
import json
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.audio import (
    CANCEL_OUT,
    Sound,
    decode,
    fit_length,
    inspect_sound,
    load_waveform,
    load_waveforms,
    resample,
)
from pipeline.errors import DecodeError

# Files of the bench that a reader may decode or refuse, and what is done here.
CHOICES = {
    "truncated.mp3": "cut short",
    "truncated.flac": "corrupt stream",
    "corrupt_frames.flac": "corrupt stream",
    "bad_crc.ogg": "corrupt stream",
}
READ = {"lying_size_zero.wav": 44_100, "aac.m4a": 77_824, "aac_adts.aac": 78_848}
"""Files that a reader may refuse, and the samples that are in them."""
REASONS = {
    "zero_length.wav": "empty file",
    "header_only.wav": "no samples",
    "half_header.wav": "unreadable header",
    "huge_rate.wav": "implausible sample rate",
    "nan_inf.wav": "non-finite samples",
    "png_named.wav": "not audio",
}


def tone(hz: float, seconds: float, rate: int) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def encode(samples: np.ndarray, rate: int = 32_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


def test_every_file_of_the_bench_ends_as_its_manifest_says(torture_dir: Path) -> None:
    entries = json.loads((torture_dir / "MANIFEST.json").read_text())["entries"]
    for entry in entries:
        path = torture_dir / entry["file"]
        if not entry["file"].startswith("files/") or not path.exists():  # the dangling link has no bytes to decode
            continue
        outcome = outcome_of(path.read_bytes())
        if isinstance(outcome, Sound):
            assert entry["expect"] in {"decode", "either"}, path.name
            assert outcome.sample_rate_hz == entry.get("sr", outcome.sample_rate_hz), path.name
            if "seconds" in entry:
                assert len(outcome.samples) == pytest.approx(entry["seconds"] * outcome.sample_rate_hz, rel=1e-3)
            assert np.isfinite(outcome.samples).all()
            assert np.abs(outcome.samples).max() < 2
        else:
            assert entry["expect"] in {"reject", "either"}, (path.name, outcome)
            assert outcome.reason == REASONS.get(path.name, outcome.reason), path.name
    choices = {Path(entry["file"]).name for entry in entries if entry["expect"] == "either"}
    assert choices >= CHOICES.keys() | READ.keys()


@pytest.mark.parametrize("name", CHOICES)
def test_damaged_files_that_might_pass_are_refused_with_their_damage(torture_dir: Path, name: str) -> None:
    with pytest.raises(DecodeError) as raised:
        decode((torture_dir / "files" / name).read_bytes())
    assert raised.value.reason == CHOICES[name]


@pytest.mark.parametrize("name", READ)
def test_files_that_might_be_refused_are_read_whole(torture_dir: Path, name: str) -> None:
    assert inspect_sound((torture_dir / "files" / name).read_bytes()).frames == READ[name]


def outcome_of(data: bytes) -> Sound | DecodeError:
    try:
        sound = decode(data)
        inspect_sound(data)
        return sound
    except DecodeError as error:
        return error


@pytest.mark.parametrize(
    ("format", "subtype", "extension"),
    [
        ("WAV", "PCM_16", "wav"),
        ("FLAC", "PCM_24", "flac"),
        ("MP3", None, "mp3"),
        ("OGG", "VORBIS", "ogg"),
        ("OGG", "OPUS", "opus"),
        ("AIFF", "PCM_16", "aiff"),
        ("W64", "FLOAT", "w64"),
        ("RF64", "PCM_16", "wav"),
        ("CAF", "PCM_16", "caf"),
    ],
)
def test_formats_are_known_by_content_and_keep_their_sound(format: str, subtype: str | None, extension: str) -> None:
    samples = 0.5 * tone(440, 1.0, 48_000)
    data = encode(np.stack([samples, samples], axis=1), 48_000, format, subtype)
    facts = inspect_sound(data)
    assert (facts.format, facts.sample_rate_hz, facts.channels) == (extension, 48_000, 2)
    assert facts.frames == pytest.approx(48_000, abs=2_400)  # MP3 pads to whole frames
    decoded = decode(data).samples
    assert decoded.dtype == np.float32
    middle = decoded[12_000:36_000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_channels_are_averaged() -> None:
    channels = np.stack([np.full(100, 0.5), np.full(100, -0.25), np.full(100, 0.5)], axis=1)
    np.testing.assert_allclose(decode(encode(channels, subtype="FLOAT")).samples, 0.25, atol=1e-6)


def test_only_the_wanted_seconds_are_read() -> None:
    data = encode(tone(440, 3.0, 8_000), 8_000)
    assert len(decode(data, max_seconds=1.5).samples) == 12_000
    assert len(decode(data, max_seconds=99).samples) == 24_000
    np.testing.assert_array_equal(decode(data, max_seconds=1.5).samples, decode(data).samples[:12_000])


@pytest.mark.parametrize(
    ("format", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None), ("FLAC", "PCM_16"), ("WAV", "PCM_16")]
)
def test_reading_in_blocks_changes_no_sample(format: str, subtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data = encode(0.2 * rng.standard_normal((30_000, 2)).astype(np.float32), 48_000, format, subtype)
    whole = decode(data).samples
    monkeypatch.setattr("pipeline.dataset.sound_decoders.BLOCK_VALUES", 2 * 7_000)
    np.testing.assert_array_equal(decode(data).samples, whole)


def test_half_an_hour_costs_no_more_memory_than_the_seconds_that_are_read(torture_dir: Path) -> None:
    data = (torture_dir / "files" / "silence_30min.flac").read_bytes()
    tracemalloc.start()
    decode(data, max_seconds=10)
    inspect_sound(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # whole it would be 115 MB


def test_a_header_that_promises_gigabytes_allocates_none() -> None:
    wav = bytearray(encode(np.zeros(1000, np.float32)))
    struct.pack_into("<I", wav, 4, 2**32 - 1)
    struct.pack_into("<I", wav, wav.index(b"data") + 4, 2**32 - 9)
    tracemalloc.start()
    assert len(decode(bytes(wav)).samples) == 1000
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_codec_overshoot_stays_and_other_units_are_scaled_down() -> None:
    overshoot = 1.2 * tone(440, 0.1, 32_000)
    np.testing.assert_array_equal(decode(encode(overshoot, subtype="FLOAT")).samples, overshoot)
    integers = 20_000 * tone(440, 0.1, 32_000)
    scaled = decode(encode(integers, subtype="FLOAT")).samples
    assert np.abs(scaled).max() == 1
    np.testing.assert_allclose(scaled, integers / np.abs(integers).max(), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_one_non_finite_sample_is_refused(value: float) -> None:
    samples = np.zeros((500, 2))
    samples[250, 1] = value
    with pytest.raises(DecodeError, match="non-finite samples: 1 of the first 500"):
        decode(encode(samples, subtype="DOUBLE"))


def test_clips_that_are_too_long_are_refused(torture_dir: Path) -> None:
    data = (torture_dir / "files" / "silence_30min.flac").read_bytes()
    with pytest.raises(DecodeError, match="too long"):
        inspect_sound(data, max_seconds=60)
    assert inspect_sound(data).frames == 28_800_000


@pytest.mark.parametrize("rate", [999, 768_001])
def test_implausible_rates_are_refused(rate: int) -> None:
    with pytest.raises(DecodeError, match=f"implausible sample rate: {rate} Hz"):
        decode(encode(np.zeros(10, np.float32), rate))


def test_too_many_channels_are_refused() -> None:
    with pytest.raises(DecodeError, match="implausible channel count: 65"):
        decode(encode(np.zeros((10, 65), np.float32)))


@given(
    st.sampled_from([("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), min_size=1, max_size=8),
    st.integers(0, 10**6),
)
def test_damaged_files_decode_or_fail_and_never_do_anything_else(
    kind: tuple[str, str | None], changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(encode(tone(440, 0.2, 24_000), 24_000, *kind))
    for position, patch in changes:
        position %= len(data)
        data[position : position + len(patch)] = patch
    del data[len(data) - cut % len(data) :]
    outcome = outcome_of(bytes(data))
    if isinstance(outcome, Sound):
        assert np.isfinite(outcome.samples).all()
        assert 0 < len(outcome.samples) <= 10**6


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44_100, 32_000), (8_000, 32_000), (48_000, 16_000), (192_000, 32_000)])
def test_resampling_keeps_what_fits_and_drops_what_does_not(from_hz: int, to_hz: int) -> None:
    kept = resample(tone(1_000, 1.0, from_hz), from_hz, to_hz)
    assert len(kept) == to_hz
    expected = tone(1_000, 1.0, to_hz)
    np.testing.assert_allclose(kept[to_hz // 10 : -to_hz // 10], expected[to_hz // 10 : -to_hz // 10], atol=1e-3)
    if from_hz > to_hz:
        folded = resample(tone(0.6 * to_hz, 1.0, from_hz), from_hz, to_hz)
        assert np.abs(folded[to_hz // 10 : -to_hz // 10]).max() < 1e-4  # -80 dB


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    samples = tone(440, 0.1, 32_000)
    assert resample(samples, 32_000, 32_000) is samples


@pytest.mark.parametrize("length", [1, 10, 441])
def test_clips_shorter_than_the_filter_are_resampled(length: int) -> None:
    assert abs(len(resample(np.ones(length, np.float32), 44_100, 32_000)) - length * 320 / 441) <= 1


def test_waveforms_are_padded_and_cut_at_the_end() -> None:
    samples = np.arange(1, 4, dtype=np.float32)
    assert fit_length(samples, 5).tolist() == [1, 2, 3, 0, 0]
    assert fit_length(samples, 2).tolist() == [1, 2]
    assert fit_length(samples, 3).tolist() == [1, 2, 3]


def test_a_models_waveform_has_its_rate_and_length() -> None:
    data = encode(0.5 * tone(1_000, 2.0, 44_100), 44_100)
    waveform = load_waveform(data, sample_rate_hz=32_000, seconds=3)
    assert (waveform.shape, waveform.dtype) == ((96_000,), np.float32)
    assert not waveform[64_100:].any()
    several = load_waveforms(data, sample_rates_hz=(16_000, 32_000), seconds=3)
    np.testing.assert_array_equal(several[32_000], waveform)
    assert several[16_000].shape == (48_000,)


def test_a_cut_does_not_show_in_the_last_samples() -> None:
    data = encode(0.5 * tone(997, 3.0, 44_100), 44_100, subtype="FLOAT")
    expected = resample(decode(data).samples, 44_100, 32_000)[:32_000]
    np.testing.assert_allclose(load_waveform(data, sample_rate_hz=32_000, seconds=1), expected, atol=1e-6)


@pytest.mark.parametrize("extension", ["MP3", "OGG", "FLAC"])
def test_decoders_print_nothing_past_us_about_damaged_sounds(extension: str, capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, 0.1 * np.random.default_rng(0).standard_normal(32_000), 16_000, format=extension)
    whole = stream.getvalue()
    damaged = whole[:3000] + bytes(byte ^ 0xFF for byte in whole[3000:3040]) + whole[3040:]
    # mpg123 makes notes of each of these on standard error, and doesn't know the file's name.
    for data in (whole + whole, whole[: len(whole) // 2], whole[:2000] + bytes(30) + whole[2000:], damaged):
        with suppress(DecodeError):
            decode(data)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_channels_that_cancel_out_are_noted_and_silence_is_not(subtype: str) -> None:
    left = 0.3 * tone(440, 1.0, 32_000)
    cancelling = encode(np.stack([left, -left], axis=1), subtype=subtype)
    assert inspect_sound(cancelling).notes == (CANCEL_OUT,)
    assert np.abs(decode(cancelling).samples).max() < 0.003
    for channels in ([left, left], [left, 0 * left], [0 * left, 0 * left], [left, -0.5 * left]):
        assert inspect_sound(encode(np.stack(channels, axis=1), subtype=subtype)).notes == ()
    assert inspect_sound(encode(1e-4 * left, subtype=subtype)).notes == ()


def test_channels_that_cancel_out_in_a_part_of_a_sound_alone_are_not_noted() -> None:
    left = 0.3 * tone(440, 1.0, 32_000)
    right = np.concatenate([left[:16_000], -left[16_000:]])
    assert inspect_sound(encode(np.stack([left, right], axis=1))).notes == ()


def test_six_channels_are_averaged_as_two_are() -> None:
    channels = 0.1 * np.random.default_rng(0).standard_normal((1_000, 6)).astype(np.float32)
    np.testing.assert_allclose(decode(encode(channels, subtype="FLOAT")).samples, channels.mean(axis=1), atol=1e-7)
