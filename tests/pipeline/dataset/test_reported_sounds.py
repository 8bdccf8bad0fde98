"""Sounds from public bug reports of other projects are heard whole; the files lie beside the checkout."""

from pathlib import Path

import pytest

from pipeline.dataset.audio import inspect_sound

CASES = Path(__file__).resolve().parents[4] / "shared" / "cases"


@pytest.mark.parametrize(
    ("file", "frames", "sample_rate_hz"),
    [
        ("01-vbr-mp3-without-xing/noise_first.mp3", 442_368, 44_100),
        ("01-vbr-mp3-without-xing/sil_first.mp3", 442_368, 44_100),
        ("01-vbr-mp3-without-xing/sample.mp3", 481_536, 48_000),
        ("05-concatenated-streams/chain.ogg", 529_200, 44_100),
        ("05-concatenated-streams/chain.opus", 576_000, 48_000),
        ("13-ogg-variants-refused/oggflac.oga", 132_300, 22_050),
        ("13-ogg-variants-refused/tail.ogg", 264_600, 44_100),
        ("16-small-things/e.wav", 264_600, 44_100),
        ("16-small-things/f.mp3", 264_600, 44_100),
    ],
)
def test_a_sound_that_others_cut_or_refuse_is_heard_whole(file: str, frames: int, sample_rate_hz: int) -> None:
    path = CASES / file
    if not path.exists():
        pytest.skip(f"the reported sounds ../shared/cases/{file} are not beside this checkout")
    facts = inspect_sound(path.read_bytes())
    assert (facts.frames, facts.sample_rate_hz) == (frames, sample_rate_hz)
