"""Checks an Ogg stream's page checksums, which decoders pass over in silence when they lose a page."""

import struct
import zlib

from pipeline.errors import DecodeError

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, sequence, checksum, segments
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_ogg(data: bytes) -> None:
    """Check that a file is an unbroken run of Ogg pages.

    Raises:
        DecodeError: a page is damaged or cut, or bytes lie between pages.

    Ogg encapsulation: RFC 3533, section 6.
    """
    offset = page = 0
    while offset < len(data):
        header = data[offset : offset + _HEADER.size]
        if len(header) < _HEADER.size or not header.startswith(b"OggS"):
            raise DecodeError("corrupt stream", f"no Ogg page at byte {offset}")
        *_, checksum, segments = _HEADER.unpack(header)
        body = offset + _HEADER.size + segments
        end = body + sum(data[offset + _HEADER.size : body])
        if end > len(data):
            raise DecodeError("cut short", f"Ogg page {page} ends {end - len(data)} bytes behind the file")
        # The checksum is taken with its own field as zeros.
        if _ogg_crc(data[offset : offset + 22] + bytes(4) + data[offset + 26 : end]) != checksum:
            raise DecodeError("corrupt stream", f"the checksum of Ogg page {page} is wrong")
        offset, page = end, page + 1


def _ogg_crc(data: bytes) -> int:
    """CRC-32 with Ogg's conventions, most significant bit first, from 0: zlib's on mirrored bits."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
