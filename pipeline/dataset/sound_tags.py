"""What taggers put before, between and behind sounds: found and passed over, never heard."""

import struct

_APE = struct.Struct("<8sIIII8x")
"""Preamble, version, size of items and footer, items, flags."""
_APE_HEADER = 1 << 31
_ID3V1_BYTES = 128
_LYRICS_END = (b"LYRICSEND", b"LYRICS200")


def tag_size(data: bytes, place: int) -> int:
    """Returns how many bytes the tag has that begins at `place`; 0 where none does.

    ID3v2 (id3.org, "ID3v2.4.0 - Main Structure", section 3), ID3v1, APEv2 and Lyrics3 are known. A tag may say that it
    ends behind the data.
    """
    head = data[place : place + _APE.size]
    if head.startswith(b"ID3") and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head.startswith(b"TAG"):
        return _ID3V1_BYTES
    if head.startswith(b"APETAGEX") and len(head) == _APE.size:
        _, _, size, _, flags = _APE.unpack(head)
        return _APE.size + size if flags & _APE_HEADER else _APE.size
    if head.startswith(b"LYRICSBEGIN"):
        ends = [end + len(mark) for mark in _LYRICS_END if (end := data.find(mark, place)) >= 0]
        return min(ends, default=len(data)) - place
    return 0


def behind_tags(data: bytes) -> int:
    """Returns where the tags end that a file begins with."""
    place = 0
    while place < len(data) and (size := tag_size(data, place)):
        place += size
    return min(place, len(data))


def behind_zeros(data: bytes, place: int) -> int:
    """Returns where the zeros end that begin at `place`, if any do."""
    return len(data) - len(data[place:].lstrip(b"\0")) if data.startswith(b"\0", place) else place
