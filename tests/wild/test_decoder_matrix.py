"""Every format is heard as FFmpeg's command line hears it, to the last sample, whatever its rate, channels, length."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from encoded_sounds import noise
from ffmpeg_formats import FORMATS, Format, read_all, write_all

from pipeline.dataset.audio import decode, inspect_sound
from pipeline.dataset.sound_decoders import SndfileStream
from pipeline.dataset.sound_formats import identify
from pipeline.errors import DecodeError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ingest.md"
RATES = sorted({rate for format in FORMATS for rate in format.rates})
LENGTHS = (60, 4_100, 12_001)
SUMMED_OTHERWISE = 2e-7
"""What the mean of more than two channels may differ by."""


@pytest.mark.parametrize(("channels", "rate", "samples"), [*product((1, 2, 6), RATES, LENGTHS), (8, 48_000, 12_001)])
def test_every_format_is_heard_as_ffmpeg_hears_it(channels: int, rate: int, samples: int, tmp_path: Path) -> None:
    formats = [
        format for format in FORMATS if rate in format.rates and channels in format.channels and samples >= format.least
    ]
    paths = write_all(formats, 0.5 * noise(samples, channels), rate, tmp_path)
    theirs = read_all(paths, channels)
    found = {format.name: difference(format, path, theirs[format], rate, samples) for format, path in paths.items()}
    assert {name: what for name, what in found.items() if what} == {}


def difference(format: Format, path: Path, theirs: np.ndarray, rate: int, samples: int) -> str:
    """What is not as it should be of a file, in words; none if all is."""
    if format.name.startswith("opus."):
        rate, samples = 48_000, samples * 48_000 // rate
    try:
        facts, mono = inspect_sound(path.read_bytes()), decode(path.read_bytes()).samples
    except DecodeError as error:
        return f"refused: {error}"
    found = (facts.format, facts.sample_rate_hz, facts.channels, facts.frames)
    expected = (format.extension, rate, theirs.shape[1], samples if format.is_exact else len(theirs))
    if found != expected:
        return f"{found}, not {expected}"
    if len(theirs) < facts.frames:  # more may be padding, which FFmpeg leaves in Vorbis
        return f"FFmpeg finds {len(theirs)} of {facts.frames} samples"
    apart = np.abs(mono - theirs[: facts.frames].mean(axis=1)).max()
    return "" if apart <= max(format.tolerance, SUMMED_OTHERWISE) else f"{apart:.2g} apart"


def test_the_page_tells_of_every_format_who_reads_it_and_what_it_is_known_as(tmp_path: Path) -> None:
    section = PAGE.read_text().split("## What can be read\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (libsndfile|FFmpeg)[^|]* \| ([^|]+) \|", section, re.MULTILINE)
    told = {(row, reader, extension) for row, reader, extensions in rows for extension in extensions.split(", ")}
    rates = {format: max(format.rates) for format in FORMATS}
    paths: dict[Format, Path] = {}
    for rate in set(rates.values()):
        paths |= write_all([f for f in FORMATS if rates[f] == rate], noise(4_800), rate, tmp_path)
    found = set()
    for format, path in paths.items():
        is_sndfile = isinstance(identify(path.read_bytes()).streams[0], SndfileStream)
        found.add((format.row, "libsndfile" if is_sndfile else "FFmpeg", format.extension))
    assert told == found
