"""Ogg: the files that were chained into one, each an unbroken run of pages. Decoders pass over lost pages in silence.

Ogg encapsulation: RFC 3533, section 6.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.dataset.sound_decoders import ContainerStream, EncodedStream, SndfileStream
from pipeline.errors import DecodeError

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
_MARK = b"OggS"
_VORBIS = b"\x01vorbis"
_BEGINS = 2
"""The flag of a page that begins a stream."""
_SERIAL, _SERIAL_AT = struct.Struct("<I"), 14
_CHECKSUM, _CHECKSUM_AT = struct.Struct("<I"), 22
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    start: int
    body: int
    """Where what is in it begins."""
    end: int
    flags: int
    granule: int
    """Of sound: samples of a channel up to the page's end; 0 for headers, -1 where no packet ends."""
    serial: int
    sequence: int


@dataclass(slots=True)
class _Link:
    """One of the files that were chained: streams that begin together."""

    start: int
    end: int
    beginnings: list[bytes] = field(default_factory=list)
    """The first bytes of each of its streams."""
    sequences: dict[int, int] = field(default_factory=dict)
    """Serial number → number of the last page, of streams whose headers are over."""
    granules: list[int] = field(default_factory=list)
    """Of its pages with more than headers."""


def ogg_streams(data: bytes) -> list[EncodedStream]:
    """Returns the files that were chained into one, most often it alone; those without sound don't count.

    Raises:
        DecodeError: a page is damaged, cut or missing, or bytes lie between pages. What lies behind the last doesn't
            matter.
    """
    links = _links(data)
    return [_stream(data, link) for link in [link for link in links if link.granules] or links[:1]]


def begins_with(data: bytes, beginning: bytes) -> bool:
    """Returns whether the first stream of a file that `ogg_streams` has read begins with these bytes."""
    return data.startswith(beginning, next(_pages(data)).body)


def _stream(data: bytes, link: _Link) -> EncodedStream:
    is_all = link.start == 0 and link.end == len(data)
    data = data if is_all else data[link.start : link.end]
    if len(link.beginnings) > 1:  # the granules may be those of pictures
        return ContainerStream(data=data, demuxer="ogg")
    if link.beginnings[0] == _VORBIS:  # FFmpeg doesn't cut the end of a stream of one or two pages
        return SndfileStream(data=data, samples=None)
    least = link.granules[-1] - link.granules[0] if link.granules else 0
    return ContainerStream(data=data, demuxer="ogg", least=max(0, least))


def _links(data: bytes) -> list[_Link]:
    links: list[_Link] = []
    has_begun = False
    for number, page in enumerate(_pages(data)):
        (checksum,) = _CHECKSUM.unpack_from(data, page.start + _CHECKSUM_AT)
        if _page_checksum(data[page.start : page.end]) != checksum:
            raise DecodeError("corrupt stream", f"the checksum of Ogg page {number} is wrong")
        if page.flags & _BEGINS:
            if has_begun or not links:
                links.append(_Link(page.start, page.end))
            links[-1].beginnings.append(data[page.body : page.body + len(_VORBIS)])
        elif not links:
            raise DecodeError("unreadable header", "the first Ogg page begins no stream")
        has_begun = not page.flags & _BEGINS
        _append(links[-1], page, number)
    return links


def _append(link: _Link, page: _Page, number: int) -> None:
    # A live stream sends its headers and then goes on wherever it is.
    if missing := page.sequence - link.sequences.get(page.serial, page.sequence - 1) - 1:
        raise DecodeError("corrupt stream", f"{missing} Ogg pages are missing before page {number}")
    if page.granule > 0:
        link.granules.append(page.granule)
    if page.granule > 0 or page.serial in link.sequences:
        link.sequences[page.serial] = page.sequence
    link.end = page.end


def check_ogg(data: bytes) -> None:
    """Check that a file is an unbroken run of Ogg pages.

    Raises:
        DecodeError: as `ogg_streams`.
    """
    _links(data)


def with_serial_number(data: bytes, number: int) -> bytes:
    """Put a serial number into a file of one stream: encoders draw one, and equal sounds give unequal files.

    Raises:
        DecodeError: it is no unbroken run of Ogg pages.
    """
    renumbered = bytearray(data)
    for page in _pages(data):
        _SERIAL.pack_into(renumbered, page.start + _SERIAL_AT, number)
        checksum = _page_checksum(bytes(renumbered[page.start : page.end]))
        _CHECKSUM.pack_into(renumbered, page.start + _CHECKSUM_AT, checksum)
    return bytes(renumbered)


def _pages(data: bytes) -> Iterator[_Page]:
    """Yields the pages, up to the last."""
    offset = number = 0
    while offset < len(data):
        header = data[offset : offset + _HEADER.size]
        if not header.startswith(_MARK):
            if offset and data.find(_MARK, offset) < 0:  # a tag, or what was on the disk before
                return
            raise DecodeError("corrupt stream", f"no Ogg page at byte {offset}")
        if len(header) < _HEADER.size:
            raise DecodeError("cut short", f"the header of Ogg page {number} ends behind the file")
        _, _, flags, granule, serial, sequence, _, segments = _HEADER.unpack(header)
        body = offset + _HEADER.size + segments
        end = body + sum(data[offset + _HEADER.size : body])
        if end > len(data):
            raise DecodeError("cut short", f"Ogg page {number} ends {end - len(data)} bytes behind the file")
        yield _Page(offset, body, end, flags, granule, serial, sequence)
        offset, number = end, number + 1


def _page_checksum(page: bytes) -> int:
    # It is taken with its own field as zeros.
    return _ogg_crc(page[:_CHECKSUM_AT] + bytes(_CHECKSUM.size) + page[_CHECKSUM_AT + _CHECKSUM.size :])


def _ogg_crc(data: bytes) -> int:
    """CRC-32 with Ogg's conventions, most significant bit first, from 0: zlib's on mirrored bits."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
