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


def pages(data: bytes) -> list[bytes]:
    starts = [start for start in range(len(data)) if data.startswith(b"OggS", start)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def test_a_missing_page_is_found() -> None:
    first, second, *others = pages(long_opus())
    assert len(others) > 3
    with pytest.raises(DecodeError, match=r"corrupt stream: 1 Ogg pages are missing before page 4"):
        check_ogg(b"".join([first, second, *others[:2], *others[3:]]))


def test_a_page_that_ends_before_the_one_before_it_is_found() -> None:
    parts = pages(long_opus())
    parts[4] = parts[4][:6] + parts[2][6:14] + parts[4][14:]
    damaged = with_serial_number(b"".join(parts), 1)
    with pytest.raises(DecodeError, match="contradictory length: Ogg page 4 ends before"):
        check_ogg(damaged)


def test_a_file_that_begins_in_the_middle_of_a_stream_is_refused() -> None:
    with pytest.raises(DecodeError, match="unreadable header: the first Ogg page begins no stream"):
        check_ogg(b"".join(pages(long_opus())[2:]))


def test_a_cut_header_of_a_page_is_found(ogg: bytes) -> None:
    with pytest.raises(DecodeError, match=r"cut short: the header of Ogg page \d+ ends behind the file"):
        check_ogg(ogg + ogg[:20])


def long_opus() -> bytes:
    stream = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 400_000)
    soundfile.write(stream, samples, 48_000, format="OGG", subtype="OPUS")
    return stream.getvalue()
