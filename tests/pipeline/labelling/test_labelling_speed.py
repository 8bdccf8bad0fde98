"""What a store notes of stage 1's speed is what is read again."""

from pathlib import Path

import pytest

from pipeline.errors import LogitStoreError
from pipeline.labelling.labelling_speed import SPEED_NAME, LabellingSpeed, read_speed, write_speed


def test_a_noted_speed_is_read_again_and_absence_is_no_speed(tmp_path: Path) -> None:
    assert read_speed(str(tmp_path)) is None
    speed = LabellingSpeed(clips=30, busy_seconds=20.0, seconds=25.0)
    write_speed(str(tmp_path), speed)
    assert read_speed(str(tmp_path)) == speed
    assert speed.clips_per_second == 1.5


@pytest.mark.parametrize("text", ["", "[1]", '{"clips": 3}', '{"clips": 0, "busy_seconds": 1, "seconds": 1}'])
def test_a_damaged_note_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / SPEED_NAME).write_text(text)
    with pytest.raises(LogitStoreError, match="not a note of a speed"):
        read_speed(str(tmp_path))
