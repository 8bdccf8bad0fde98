import struct

import numpy as np
import pytest
from encoded_sounds import by_ffmpeg, noise

from pipeline.dataset.audio import decode, inspect_sound
from pipeline.dataset.media_boxes import is_webm, matroska_streams, mp4_streams
from pipeline.errors import DecodeError

M4A, FRAGMENTS = (
    by_ffmpeg(noise(40_000), 16_000, "mp4", "aac", options=options)
    for options in ({}, {"movflags": "frag_keyframe+empty_moov"})
)
WEBM = by_ffmpeg(noise(40_000), 48_000, "webm", "libopus")
MKA = by_ffmpeg(noise(40_000), 16_000, "matroska", "aac")


def box_at(data: bytes, kind: bytes) -> tuple[int, int]:
    """Where a box begins, and its size."""
    start = data.index(kind) - 4
    return start, struct.unpack_from(">I", data, start)[0]


def without(data: bytes, kind: bytes) -> bytes:
    start, size = box_at(data, kind)
    return data[:start] + data[start + size :]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("data", [M4A, FRAGMENTS, WEBM, MKA], ids=["mp4", "fragments", "webm", "mka"])
def test_a_file_that_is_cut_is_refused(data: bytes, share: float) -> None:
    with pytest.raises(DecodeError, match=r"cut short|contradictory length|corrupt stream"):
        inspect_sound(data[: int(share * len(data))])


def test_a_download_without_its_index_is_refused() -> None:
    with pytest.raises(DecodeError, match=r"cut short: it has no index \(moov\)"):
        inspect_sound(without(M4A, b"moov"))
    with pytest.raises(DecodeError, match="no index"):  # a whole one before it doesn't help
        mp4_streams(M4A + without(M4A, b"moov"))


def test_a_box_may_say_its_size_in_64_bits_or_that_it_goes_to_the_end() -> None:
    wanted = decode(FRAGMENTS).samples
    start, size = box_at(FRAGMENTS, b"mfra")
    to_the_end = FRAGMENTS[:start] + struct.pack(">I", 0) + FRAGMENTS[start + 4 :]
    assert start + size == len(FRAGMENTS)
    np.testing.assert_array_equal(decode(to_the_end).samples, wanted)
    long = struct.pack(">I4sQ", 1, b"free", 16 + 100) + bytes(100)
    np.testing.assert_array_equal(decode(FRAGMENTS + long).samples, wanted)


def test_what_is_no_box_ends_the_file() -> None:
    assert len(mp4_streams(M4A + b"\0\0\0\3junk" + M4A)) == 1
    assert len(mp4_streams(M4A + M4A)) == 2


def test_joined_files_are_heard_one_after_the_other() -> None:
    for data in (M4A, FRAGMENTS, WEBM, MKA):
        one = decode(data).samples
        np.testing.assert_array_equal(decode(data + data).samples, np.concatenate([one, one]))


def test_what_is_no_element_ends_the_file() -> None:
    assert len(matroska_streams(WEBM + b"\x42junk" + WEBM)) == 1
    assert len(matroska_streams(WEBM + b"\x1a\x45\xdf")) == 1


def test_webm_is_told_from_other_matroska() -> None:
    assert (is_webm(WEBM), is_webm(MKA)) == (True, False)
    assert (inspect_sound(WEBM).format, inspect_sound(MKA).format) == ("webm", "mka")
