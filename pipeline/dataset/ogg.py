"""Checks an Ogg stream's page checksums, which decoders pass over in silence when they lose a page; numbers streams."""

import struct
import zlib
from collections.abc import Iterator

from pipeline.errors import DecodeError

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
_SERIAL, _SERIAL_AT = struct.Struct("<I"), 14
_CHECKSUM, _CHECKSUM_AT = struct.Struct("<I"), 22
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_ogg(data: bytes) -> None:
    """Check that a file is an unbroken run of Ogg pages.

    Raises:
        DecodeError: a page is damaged or cut, or bytes lie between pages.

    Ogg encapsulation: RFC 3533, section 6.
    """
    for page, (start, end) in enumerate(_pages(data)):
        (checksum,) = _CHECKSUM.unpack_from(data, start + _CHECKSUM_AT)
        if _page_checksum(data[start:end]) != checksum:
            raise DecodeError("corrupt stream", f"the checksum of Ogg page {page} is wrong")


def with_serial_number(data: bytes, number: int) -> bytes:
    """Put a serial number into a file of one stream: encoders draw one, and equal sounds give unequal files.

    Raises:
        DecodeError: it is no unbroken run of Ogg pages.
    """
    renumbered = bytearray(data)
    for start, end in _pages(data):
        _SERIAL.pack_into(renumbered, start + _SERIAL_AT, number)
        _CHECKSUM.pack_into(renumbered, start + _CHECKSUM_AT, _page_checksum(bytes(renumbered[start:end])))
    return bytes(renumbered)


def _pages(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields where each page begins and ends."""
    offset = page = 0
    while offset < len(data):
        header = data[offset : offset + _HEADER.size]
        if len(header) < _HEADER.size or not header.startswith(b"OggS"):
            raise DecodeError("corrupt stream", f"no Ogg page at byte {offset}")
        *_, segments = _HEADER.unpack(header)
        body = offset + _HEADER.size + segments
        end = body + sum(data[offset + _HEADER.size : body])
        if end > len(data):
            raise DecodeError("cut short", f"Ogg page {page} ends {end - len(data)} bytes behind the file")
        yield offset, end
        offset, page = end, page + 1


def _page_checksum(page: bytes) -> int:
    # It is taken with its own field as zeros.
    return _ogg_crc(page[:_CHECKSUM_AT] + bytes(_CHECKSUM.size) + page[_CHECKSUM_AT + _CHECKSUM.size :])


def _ogg_crc(data: bytes) -> int:
    """CRC-32 with Ogg's conventions, most significant bit first, from 0: zlib's on mirrored bits."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
