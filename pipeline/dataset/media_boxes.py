"""MP4 and Matroska (WebM): where a file ends that was joined to another, and whether it is cut.

Both are boxes that say their own length. FFmpeg reads what is in them; but of joined MP4 files it plays the first one,
and where a Matroska file was cut it stops without a word.

The formats: ISO/IEC 14496-12, section 4.2, and RFC 8794 with RFC 9559.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise

from pipeline.dataset.sound_decoders import MP4, ContainerStream
from pipeline.errors import DecodeError

_BOX = struct.Struct(">I4s")
_LONG_SIZE = struct.Struct(">8xQ")
_EBML, _SEGMENT, _CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_IN_FILE = ("1a45dfa3", "18538067", "ec", "bf")
_IN_SEGMENT = ("114d9b74", "1549a966", "1654ae6b", "1f43b675", "1c53bb6b", "1941a469", "1043a770", "1254c367")
_IN_CLUSTER = ("e7", "a3", "a0", "ab", "a7", "af", "5854")
_ELEMENTS = frozenset(map(bytes.fromhex, (*_IN_FILE, *_IN_SEGMENT, *_IN_CLUSTER)))
"""The ids of what may stand there; anything else is no part of the file."""


def mp4_streams(data: bytes) -> list[ContainerStream]:
    """Returns the MP4 files that were joined into one, most often it alone.

    Raises:
        DecodeError: one has no index, as a recording or a download that was not finished.
    """
    starts, kinds, ends_early = [0], set[bytes](), False
    for kind, start, end in _boxes(data):
        if kind == b"ftyp" and kinds & {b"moov", b"mdat"}:
            _check_index(kinds)
            starts.append(start)
            kinds = set()
        kinds.add(kind)
        ends_early = end > len(data)
    _check_index(kinds)
    return _streams(data, MP4, starts, ends_early)


def matroska_streams(data: bytes) -> list[ContainerStream]:
    """Returns the Matroska files that were joined into one, most often it alone."""
    starts, ends_early = [], False
    for kind, start, end in _elements(data):
        if kind == _EBML:
            starts.append(start)
        ends_early = end > len(data)
    return _streams(data, "matroska", starts or [0], ends_early)


def is_webm(data: bytes) -> bool:
    """Returns whether a Matroska file says that it is the WebM kind."""
    return b"webm" in data[:64]


def _streams(data: bytes, demuxer: str, starts: list[int], ends_early: bool) -> list[ContainerStream]:
    bounds = [*starts, len(data)]
    return [
        ContainerStream(
            data=data[start:end] if len(starts) > 1 else data,
            demuxer=demuxer,
            ends_early=ends_early and end == len(data),
        )
        for start, end in pairwise(bounds)
    ]


def _check_index(kinds: set[bytes]) -> None:
    if b"moov" not in kinds:
        raise DecodeError("cut short", "it has no index (moov): the recording or the download was not finished")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, first byte, byte behind the last) of a file's outermost boxes; the last may end behind the data."""
    place = 0
    while place + _BOX.size <= len(data):
        size, kind = _BOX.unpack_from(data, place)
        if size == 1 and place + _LONG_SIZE.size <= len(data):
            (size,) = _LONG_SIZE.unpack_from(data, place)
        elif size == 0:  # up to the end of the file
            size = len(data) - place
        if size < _BOX.size or not all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in kind):
            return
        yield kind, place, place + size
        place += size


def _elements(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (id, first byte, byte behind the last) of a file's elements; the last one may end behind the data.

    What is in a segment is gone through one by one, and so is a cluster whose length its recorder could not know.
    """
    place = 0
    while place < len(data):
        size_place = place + _leading_zeros(data[place]) + 1
        kind = data[place:size_place]
        if kind not in _ELEMENTS or size_place >= len(data):
            return
        start = size_place + _leading_zeros(data[size_place]) + 1
        unknown = (1 << 7 * (start - size_place)) - 1
        size = int.from_bytes(data[size_place:start], "big") & unknown
        is_open = kind == _SEGMENT or (kind == _CLUSTER and size == unknown)
        if size == unknown and not is_open:
            return
        end = start if is_open else start + size
        yield kind, place, end
        place = end


def _leading_zeros(byte: int) -> int:
    return 8 - byte.bit_length()
