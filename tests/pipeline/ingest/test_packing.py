import struct
from pathlib import Path

import numpy as np
import pytest
from encoded_sounds import by_sndfile, noise

from pipeline.commands.ingest_audioset import IngestAudiosetConfig
from pipeline.commands.ingest_audioset import run as ingest_audioset
from pipeline.commands.ingest_folder import IngestFolderConfig
from pipeline.commands.ingest_folder import run as ingest_folder
from pipeline.commands.verify_path import VerifyConfig
from pipeline.commands.verify_path import run as verify
from pipeline.dataset.audio import CANCEL_OUT, LONGER, SHORTER
from pipeline.ingest.preparing import LONGER_THAN_SEGMENT

RATE = 8_000


def with_size(wav: bytes, size: int) -> bytes:
    place = wav.index(b"data") + 4
    return wav[:place] + struct.pack("<I", size) + wav[place + 4 :]


def test_what_is_odd_about_sounds_is_counted_by_ingest_and_again_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = noise(RATE)
    wav = by_sndfile(left, RATE)
    sounds = {
        "plain": wav,
        "unfinished": with_size(wav, 0),
        "short": with_size(wav, 10 * len(wav)),
        "long": with_size(wav, len(wav) // 10),
        "opposed": by_sndfile(np.hstack([left, -left]), RATE),
    }
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name, data in sounds.items():
        (tmp_path / "in" / "a" / f"{name}.wav").write_bytes(data)
    wanted = {SHORTER: 1, LONGER: 1, CANCEL_OUT: 1}
    result = ingest_folder(IngestFolderConfig(audio=str(tmp_path / "in"), out=str(tmp_path / "out"), workers=2))
    assert (result.clips, result.rejected, result.notes) == (5, {}, wanted)
    said = capsys.readouterr().out
    assert all(f"1 {note}" in " ".join(said.split()) for note in wanted)
    found = verify(VerifyConfig(str(tmp_path / "out"), decode=True))
    assert (found.faults, +found.notes) == ([], wanted)


def test_sounds_that_are_longer_than_their_segment_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for clip_id, seconds in (("AAAAAAAAAA0", 10), ("AAAAAAAAAA1", 12)):
        (tmp_path / "in" / f"{clip_id}.wav").write_bytes(by_sndfile(noise(seconds * RATE), RATE))
    segments = tmp_path / "segments.csv"
    segments.write_text('AAAAAAAAAA0, 30, 40, "/m/09x0r"\nAAAAAAAAAA1, 30, 40, "/m/09x0r"\n')
    result = ingest_audioset(
        IngestAudiosetConfig(
            segments=(str(segments),), audio=str(tmp_path / "in"), out=str(tmp_path / "out"), workers=2
        )
    )
    assert (result.clips, result.notes) == (2, {LONGER_THAN_SEGMENT: 1})
