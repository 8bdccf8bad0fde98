"""Ogg: the files that were chained into one, each an unbroken run of pages. Decoders pass over lost pages in silence.

Ogg encapsulation: RFC 3533, section 6.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.dataset.sound_decoders import ContainerStream, EncodedStream
from pipeline.errors import DecodeError

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
_MARK = b"OggS"
_VORBIS, _FLAC = b"\x01vorbis", b"\x7fFLAC"
_HEADER_PACKETS = {_VORBIS: 3, b"OpusHead": 2, b"Speex   ": 2}
_FLAC_HEADERS = slice(7, 9)
"""Where FLAC says how many headers follow its first; 0 where its writer didn't know."""
_BEGINNING_BYTES = 16
_EMPTY_PACKETS = 2
"""Behind the headers, so many packets may be there and yet no sample."""
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
    packets: int = 0
    """That end in it."""

    def check_granules(self) -> None:
        """Check that a link that says of no page how much sound ends there has none.

        Raises:
            DecodeError: it has more packets than headers.
        """
        first = self.beginnings[0]
        headers = next((count for mark, count in _HEADER_PACKETS.items() if first.startswith(mark)), 0)
        if first.startswith(_FLAC) and (following := int.from_bytes(first[_FLAC_HEADERS], "big")):
            headers = 1 + following
        is_alone = len(self.beginnings) == 1
        if headers and is_alone and not self.granules and self.packets > headers + _EMPTY_PACKETS:
            raise DecodeError("contradictory length", f"{self.packets} packets are to end where the sound begins")


def ogg_streams(data: bytes) -> list[EncodedStream]:
    """Returns the files that were chained into one, most often it alone; those without sound don't count.

    Raises:
        DecodeError: a page is damaged, cut or missing, or bytes lie between pages. What lies behind the last doesn't
            matter.
    """
    links = _links(data)
    for link in links:
        link.check_granules()
    return [_stream(data, link) for link in [link for link in links if link.granules] or links[:1]]


def begins_with(data: bytes, beginning: bytes) -> bool:
    """Returns whether the first stream of a file that `ogg_streams` has read begins with these bytes."""
    return data.startswith(beginning, next(_pages(data)).body)


def _stream(data: bytes, link: _Link) -> EncodedStream:
    is_all = link.start == 0 and link.end == len(data)
    data = data if is_all else data[link.start : link.end]
    if len(link.beginnings) > 1:  # the granules may be those of pictures
        return ContainerStream(data=data, demuxer="ogg")
    first, last = (link.granules[0], link.granules[-1]) if link.granules else (0, 0)
    # FFmpeg doesn't cut the end of a Vorbis stream of one or two pages.
    end = last if link.beginnings[0].startswith(_VORBIS) else None
    return ContainerStream(data=data, demuxer="ogg", least=last - first, end=end)


def _links(data: bytes) -> list[_Link]:
    links: list[_Link] = []
    has_begun = False
    for number, page in enumerate(_pages(data)):
        (checksum,) = _CHECKSUM.unpack_from(data, page.start + _CHECKSUM_AT)
        if _page_checksum(data[page.start : page.end]) != checksum:
            raise DecodeError("corrupt stream", f"the checksum of Ogg page {number} is wrong")
        if page.flags & _BEGINS:
            if links and page.sequence == links[-1].sequences.get(page.serial, page.sequence) + 1:
                raise DecodeError("corrupt stream", f"Ogg page {number} goes on with a stream that it is to begin")
            if has_begun or not links:
                links.append(_Link(page.start, page.end))
            links[-1].beginnings.append(data[page.body : page.body + _BEGINNING_BYTES])
        elif not links:
            raise DecodeError("unreadable header", "the first Ogg page begins no stream")
        has_begun = not page.flags & _BEGINS
        laces = data[page.start + _HEADER.size : page.body]
        links[-1].packets += len(laces) - laces.count(0xFF)
        _append(links[-1], page, number)
    return links


def _append(link: _Link, page: _Page, number: int) -> None:
    # A live stream sends its headers and then goes on wherever it is.
    if missing := page.sequence - link.sequences.get(page.serial, page.sequence - 1) - 1:
        raise DecodeError("corrupt stream", f"{missing} Ogg pages are missing before page {number}")
    if page.granule > 0:
        if link.granules and page.granule < link.granules[-1] and len(link.beginnings) == 1:
            raise DecodeError("contradictory length", f"Ogg page {number} ends before the one before it")
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
