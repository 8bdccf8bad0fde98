import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.dataset import sound_parts
from pipeline.dataset.audio import decode, resample
from pipeline.dataset.sound_parts import mono_parts, open_encoded
from pipeline.errors import DecodeError

RATE_HZ = 16_000


def noise(seconds: float, rate: int = 22_050) -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.8, 0.8, (round(seconds * rate), 2)).astype(np.float32)


@pytest.mark.parametrize("form", ["WAV", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("seconds", [0.4, 65])
def test_a_file_that_is_read_where_it_lies_sounds_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, seconds: float
) -> None:
    path = tmp_path / "sound"
    soundfile.write(path, noise(seconds), 22_050, format=form)
    whole = decode(path.read_bytes())
    expected = resample(whole.samples, whole.sample_rate_hz, RATE_HZ)
    monkeypatch.setattr(sound_parts, "MAPPED_BYTES", 0)
    with open_encoded(str(path)) as data:
        parts = list(mono_parts(data, RATE_HZ))
    assert all(len(part) <= 31 * RATE_HZ for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_a_mapped_flac_whose_header_counts_wrongly_is_heard_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "piped.flac"
    soundfile.write(path, noise(2), 22_050, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    monkeypatch.setattr(sound_parts, "MAPPED_BYTES", 0)
    with open_encoded(str(path)) as data:
        assert sum(map(len, mono_parts(data, 22_050))) == 2 * 22_050
    assert path.read_bytes() == content


def test_a_damaged_sound_gives_no_part_if_it_is_no_long_one(tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    soundfile.write(path, noise(20), 22_050, format="FLAC")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    parts = mono_parts(bytes(content), RATE_HZ)
    with pytest.raises(DecodeError):
        next(parts)


PEAK_OF = """
import resource, sys
from pipeline.dataset.sound_parts import mono_parts, open_encoded
with open_encoded(sys.argv[1]) as data:
    seconds = sum(len(part) for part in mono_parts(data, 8000)) / 8000
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_recording_of_hours_takes_no_more_memory_than_one_of_minutes(tmp_path: Path) -> None:
    peaks = []
    for minutes in (10, 240):  # 9.6 and 230 MB
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.zeros(0), 8000, subtype="PCM_16")
        header = bytearray(path.read_bytes())
        size = minutes * 60 * 8000 * 2
        header[4:8], header[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
        path.write_bytes(header)
        os.truncate(path, len(header) + size)
        done = subprocess.run([sys.executable, "-c", PEAK_OF, path], capture_output=True, text=True, check=True)
        seconds, peak_kb = done.stdout.split()
        assert float(seconds) == minutes * 60
        peaks.append(int(peak_kb) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks
