import io

import numpy as np
import pytest
import soundfile

from pipeline.dataset.ogg import check_ogg, with_serial_number
from pipeline.errors import DecodeError


@pytest.fixture(params=["VORBIS", "OPUS"])
def ogg(request: pytest.FixtureRequest) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    soundfile.write(stream, noise, 48_000, format="OGG", subtype=request.param)
    return stream.getvalue()


def test_whole_streams_pass(ogg: bytes) -> None:
    check_ogg(ogg)


def test_one_flipped_bit_is_found_wherever_it_is(ogg: bytes) -> None:
    for position in np.linspace(0, len(ogg) - 1, 40).astype(int):
        damaged = bytearray(ogg)
        damaged[position] ^= 16
        with pytest.raises(DecodeError):
            check_ogg(bytes(damaged))


def test_a_cut_stream_is_found(ogg: bytes) -> None:
    with pytest.raises(DecodeError, match=r"cut short: Ogg page \d+ ends 100 bytes behind the file"):
        check_ogg(ogg[:-100])


def test_bytes_between_pages_are_found(ogg: bytes) -> None:
    with pytest.raises(DecodeError, match=f"no Ogg page at byte {len(ogg)}"):
        check_ogg(ogg + b"tail" + ogg)


def test_bytes_behind_the_last_page_do_not_matter(ogg: bytes) -> None:
    check_ogg(ogg + b"TAG" + bytes(125))


def test_a_new_serial_number_is_all_that_changes(ogg: bytes) -> None:
    renumbered = with_serial_number(ogg, 7)
    check_ogg(renumbered)
    assert renumbered != ogg
    assert renumbered[14:18] == (7).to_bytes(4, "little")
    assert with_serial_number(renumbered, int.from_bytes(ogg[14:18], "little")) == ogg
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(renumbered))[0], soundfile.read(io.BytesIO(ogg))[0])
