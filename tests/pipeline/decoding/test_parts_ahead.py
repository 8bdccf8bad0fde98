from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.dataset.audio import decode
from pipeline.dataset.sound_sources import find_sounds
from pipeline.decoding.parts_ahead import parts_ahead

RATE_HZ = 8000


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_the_same_parts_come_in_order_from_any_number_of_processes(tmp_path: Path, processes: int) -> None:
    files, expected = [], {}
    for number, seconds in enumerate((70.0, 0.5, 3.0, 40.0, 1.0)):
        path = tmp_path / f"{number}.wav"
        samples = np.random.default_rng(number).uniform(-1, 1, round(seconds * RATE_HZ))
        soundfile.write(path, samples, RATE_HZ)
        files.append(str(path))
        expected[number] = decode(path.read_bytes()).samples
    (tmp_path / "2.wav").write_bytes(b"<html>")
    heard, ends = defaultdict(list), []
    for part in parts_ahead(find_sounds(files), sample_rate_hz=RATE_HZ, processes=processes):
        assert part.sound == len(ends)
        heard[part.sound].append(part.samples)
        if part.is_end:
            ends.append(part.failure)
    assert [bool(failure) for failure in ends] == [False, False, True, False, False]
    for number in (0, 1, 3, 4):
        np.testing.assert_array_equal(np.concatenate(heard[number]), expected[number])
