"""WAV, RF64, Wave64, AIFF, CAF and AU: a header, and behind it the samples, in one place.

What these headers say about the length is often wrong: a recorder that writes into a pipe can't go back to mend it, one
that was stopped didn't. The samples end where the file does, or where something begins that is none.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.dataset.sound_decoders import (
    ContainerStream,
    EncodedStream,
    RawPcm,
    SndfileStream,
    checked_channels,
    checked_rate,
)
from pipeline.dataset.sound_frames import frame_streams
from pipeline.dataset.sound_tags import tag_size
from pipeline.errors import DecodeError

_WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
_WIDTHS |= {"FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1}
"""libsndfile's names of what codes each sample by itself → bytes of a sample."""
_SIGNED = {1: "PCM_S8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}
_UNSIGNED = _SIGNED | {1: "PCM_U8"}
_FLOATS = {4: "FLOAT", 8: "DOUBLE"}
_WAV_CODINGS = {1: _UNSIGNED, 3: _FLOATS, 6: {1: "ALAW"}, 7: {1: "ULAW"}}
"""WAVE's format tag → bytes of a sample → name."""
_WAV_EXTENSIBLE = 0xFFFE
_WAV_MPEG = (0x50, 0x55)
_CAF_CODINGS = {b"ulaw": {1: "ULAW"}, b"alaw": {1: "ALAW"}}
_AIFC_CODINGS: dict[bytes, dict[int, str]] = dict.fromkeys((b"NONE", b"twos", b"sowt", b"in24", b"in32"), _SIGNED)
_AIFC_CODINGS |= dict.fromkeys((b"fl32", b"FL32", b"fl64", b"FL64"), _FLOATS)
_AIFC_CODINGS |= {name: {1: "ULAW", 2: "ULAW"} for name in (b"ulaw", b"ULAW")}  # some state the bits that it stands for
_AIFC_CODINGS |= {name: {1: "ALAW", 2: "ALAW"} for name in (b"alaw", b"ALAW")}
_AIFC_CODINGS |= {b"raw ": _UNSIGNED}
_AU_CODINGS = {1: "ULAW", 2: "PCM_S8", 3: "PCM_16", 4: "PCM_24", 5: "PCM_32", 6: "FLOAT", 7: "DOUBLE", 27: "ALAW"}

_NEXT_FILE = {
    "wav": (8, b"WAVE", re.compile(rb"(?:RIFF|RIFX|RF64|BW64)....WAVE[\x20-\x7e]{4}", re.DOTALL)),
    "w64": (0, b"riff", re.compile(rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0")),
    "aiff": (8, b"AIF", re.compile(rb"FORM....AIF[FC][\x20-\x7e]{4}", re.DOTALL)),
    "caf": (0, b"caff", re.compile(rb"caff\0[\1\2]\0\0desc")),
    "au": (0, b".snd", re.compile(rb"\.snd\0\0\0.{5}\0\0\0[\1-\x1b]\0", re.DOTALL)),
}
"""FFmpeg's name of a container → how another file begins that was joined to the first: where something in it stands
that is quickly found, that, and the whole."""
_LAST_CHUNKS = frozenset((b"LIST", b"JUNK", b"junk", b"bext", b"iXML", b"id3 ", b"ID3 ", b"_PMX", b"axml", b"free"))
"""Chunks that are known not to be sound, even where they are cut."""
_HEADER_BYTES = 8
"""Of the shortest chunk."""
_AU_HEADER_BYTES = 24
_SHORT_SECONDS, _SHORT_SHARE = 0.1, 0.02
"""Less than this behind the samples, and less than this share of them, is no sound that a header forgot."""


class _Layout(NamedTuple):
    """How a container's chunks are laid out."""

    first: int
    """Where the first one begins."""
    id_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    counts_header: bool
    """Whether a chunk's size includes its own header."""
    alignment: int


class _Chunk(NamedTuple):
    id: bytes
    start: int
    """Of what is in it."""
    size: int
    """Bytes of what is in it, if its header is right."""


_RIFF = _Layout(12, 4, 4, "little", False, 2)
_RIFX = _RIFF._replace(order="big")
_W64 = _Layout(40, 16, 8, "little", True, 8)
_AIFF = _Layout(12, 4, 4, "big", False, 2)
_CAF = _Layout(8, 4, 8, "big", False, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What a file says of itself."""

    demuxer: str
    layout: _Layout | None
    """None where there are no chunks."""
    subtype: str | None
    """libsndfile's name of the coding; None for one in which a sample is not coded by itself."""
    channels: int
    sample_rate_hz: int
    order: Literal["little", "big"]
    start: int
    """Of the samples."""
    size: int | None
    """Their bytes; None where the writer could not know."""
    stated_bytes: int = 0
    """Of one sample of all channels, in the header's own words; 0 where it doesn't say."""
    is_mpeg: bool = False

    @property
    def frame_bytes(self) -> int:
        return self.channels * _WIDTHS[self.subtype] if self.subtype else 1


def chunk_streams(data: bytes) -> list[EncodedStream]:
    """Returns the files that were joined into one, most often it alone, each with all the samples that are there.

    Raises:
        DecodeError: a header is cut, contradicts itself, or is none of a sound.
    """
    streams: list[EncodedStream] = []
    place = 0
    while place < len(data):
        file = data[place:] if place else data
        header = _parse(file)
        end, following = _extent(file, header)
        streams += _streams(file[:following] if following < len(file) else file, header, end)
        place += following
    return streams


def parse_wave_header(data: bytes) -> RawPcm:
    """Returns what the samples of a WAV are of which only the beginning is there; where they end is what it claims.

    Raises:
        DecodeError: the header is cut, contradicts itself, or names what is not coded sample by sample.
    """
    header = _parse(data)
    if header.subtype is None:
        raise DecodeError("unsupported format", "the samples of a WAV stream have to be PCM, floats, µ-law or A-law")
    end = header.start + (header.size or 0)
    return _raw_pcm(header, end)


def is_chunk_name(data: bytes) -> bool:
    """Returns whether data begins with what may be a chunk's name."""
    return _name_at(data, 0) is not None


def sample_bytes(subtype: str) -> int:
    """Returns the size of a sample of a channel in one of libsndfile's codings."""
    return _WIDTHS[subtype]


def _raw_pcm(header: _Header, end: int) -> RawPcm:
    assert header.subtype is not None
    return RawPcm(
        subtype=header.subtype,
        endian="LITTLE" if header.order == "little" else "BIG",
        sample_rate_hz=header.sample_rate_hz,
        channels=header.channels,
        start=header.start,
        end=end,
    )


def _streams(data: bytes, header: _Header, end: int) -> list[EncodedStream]:
    if header.is_mpeg:
        return list(frame_streams(data[header.start : end]))
    if header.subtype is None:
        if header.size and header.start + header.size < end:
            behind = end - header.start - header.size
            raise DecodeError("contradictory length", f"{behind} bytes behind its data are neither sound nor chunks")
        return [ContainerStream(data=data, demuxer=header.demuxer)]
    samples = max(0, end - header.start) // header.frame_bytes
    raw = _raw_pcm(header, header.start + samples * header.frame_bytes)
    claimed = header.size // header.frame_bytes if header.size else None
    return [SndfileStream(data=data, samples=samples, claimed=claimed, raw=raw)]


def _extent(data: bytes, header: _Header) -> tuple[int, int]:
    """Returns where the samples end, and where the next file begins, which is the end of the data if none does."""
    claimed = len(data) + 1 if header.size is None else header.start + header.size
    if claimed == len(data):
        return claimed, claimed
    following = _next_file(data, header.demuxer, claimed if claimed < len(data) else header.start)
    if claimed < len(data) and _is_no_sound(data, claimed, following, header):
        return claimed, following
    has_tag = data[following - 128 : following].startswith(b"TAG")
    return following - 128 * has_tag, following


def _next_file(data: bytes, demuxer: str, place: int) -> int:
    """Returns where another file begins behind `place`; the end of the data if none does."""
    before, mark, beginning = _NEXT_FILE[demuxer]
    found = data.find(mark, place + before)
    while found >= 0:
        if beginning.match(data, found - before):
            return found - before
        found = data.find(mark, found + 1)
    return len(data)


def _is_no_sound(data: bytes, start: int, end: int, header: _Header) -> bool:
    """Returns whether what lies behind the samples, if the header is right, can be told from more samples."""
    rest = data[start:end]
    is_padding = rest.count(rest[:1]) == len(rest)
    no_sound = min(_SHORT_SECONDS * header.sample_rate_hz * header.frame_bytes, _SHORT_SHARE * (header.size or 0))
    is_tag = tag_size(data, start) > 0
    return is_padding or is_tag or end - start < no_sound or _are_chunks(data, end, header)


def _are_chunks(data: bytes, end: int, header: _Header) -> bool:
    """Returns whether nothing but chunks follow one another from the samples, if the header is right, to `end`."""
    if header.layout is None or header.size is None:
        return False
    start = place = _behind_padding(data, header.start + header.size, header.size, header.layout)
    for chunk in _chunks(data[:end], header.layout, start):
        place = chunk.start + chunk.size
        if place > end:
            return chunk.id in _LAST_CHUNKS
    return place > start and end - place < _HEADER_BYTES


def _chunks(data: bytes, layout: _Layout, place: int) -> Iterator[_Chunk]:
    """Yields the chunks from `place` on, as long as something stands there that may be one."""
    header_bytes = layout.id_bytes + layout.size_bytes
    while (name := _name_at(data, place)) and place + header_bytes <= len(data):
        size = int.from_bytes(data[place + layout.id_bytes : place + header_bytes], layout.order)
        size = max(0, size - header_bytes) if layout.counts_header else size
        yield _Chunk(name, place + header_bytes, size)
        place = _behind_padding(data, place + header_bytes + size, size, layout)


def _behind_padding(data: bytes, end: int, size: int, layout: _Layout) -> int:
    """Returns where the chunk begins that follows one of some size; some writers forget to make its size even."""
    is_unpadded = layout.alignment == 2 and _name_at(data, end)
    return end if is_unpadded else end + -size % layout.alignment


def _name_at(data: bytes, place: int) -> bytes | None:
    name = data[place : place + 4]
    return name if len(name) == 4 and all(0x20 <= byte < 0x7F for byte in name) else None


def _parse(data: bytes) -> _Header:
    header = _parse_any(data)
    checked_rate(header.sample_rate_hz)
    checked_channels(header.channels)
    if header.stated_bytes not in (0, header.frame_bytes):
        stated = f"{header.stated_bytes} bytes of {header.channels} channels of {header.subtype}"
        raise DecodeError("contradictory header", f"{stated} should be {header.frame_bytes}")
    return header


def _parse_any(data: bytes) -> _Header:
    start = data[:4]
    try:
        if start in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
            return _parse_wave(data, "wav", _RIFX if start == b"RIFX" else _RIFF)
        if start == b"riff":
            return _parse_wave(data, "w64", _W64)
        if start == b"FORM":
            return _parse_aiff(data)
        return _parse_caf(data) if start == b"caff" else _parse_au(data)
    except struct.error as error:
        raise DecodeError("unreadable header", "it is cut") from error


def _parse_wave(data: bytes, demuxer: str, layout: _Layout) -> _Header:
    endian = "<" if layout.order == "little" else ">"
    coding: tuple[int, int, int, int, int] | None = None
    long_size: int | None = None
    for chunk in _chunks(data, layout, layout.first):
        if chunk.id == b"ds64":
            long_size = struct.unpack_from("<8xQ", data, chunk.start)[0]
            long_size = None if long_size == 2**64 - 1 else long_size
        elif chunk.id == b"fmt ":
            tag, channels, rate, _, frame_bytes, bits = struct.unpack_from(f"{endian}HHIIHH", data, chunk.start)
            if tag == _WAV_EXTENSIBLE and chunk.size >= 26:
                (tag,) = struct.unpack_from(f"{endian}24xH", data, chunk.start)
            coding = tag, channels, rate, frame_bytes, bits
        elif chunk.id == b"data" and coding is not None:
            tag, channels, rate, frame_bytes, bits = coding
            subtype = _WAV_CODINGS.get(tag, {}).get((bits + 7) // 8)
            unknown = 2 ** (8 * layout.size_bytes) - 1 - (layout.id_bytes + layout.size_bytes) * layout.counts_header
            size = None if chunk.size == unknown else chunk.size
            return _Header(
                demuxer=demuxer,
                layout=layout,
                subtype=subtype,
                channels=channels,
                sample_rate_hz=rate,
                order=layout.order,
                start=chunk.start,
                size=long_size if size is None else size,
                stated_bytes=frame_bytes if subtype else 0,
                is_mpeg=tag in _WAV_MPEG,
            )
    raise DecodeError("unreadable header", f"no {'data' if coding else 'fmt'} chunk")


def _parse_aiff(data: bytes) -> _Header:
    coding: tuple[int, int, int, bytes] | None = None
    sound: tuple[int, int | None] | None = None
    for chunk in _chunks(data, _AIFF, _AIFF.first):
        if chunk.id == b"COMM":
            channels, _, bits, exponent, mantissa = struct.unpack_from(">HIHHQ", data, chunk.start)
            compression = data[chunk.start + 18 : chunk.start + 22] if data[8:12] == b"AIFC" else b"NONE"
            coding = channels, bits, _from_extended(exponent, mantissa), compression
        elif chunk.id == b"SSND":
            (offset,) = struct.unpack_from(">I", data, chunk.start)
            size = None if chunk.size == 2**32 - 1 else max(0, chunk.size - 8 - offset)
            sound = chunk.start + 8 + offset, size
    if coding is None or sound is None:
        raise DecodeError("unreadable header", f"no {'COMM' if coding is None else 'SSND'} chunk")
    channels, bits, rate, compression = coding
    return _Header(
        demuxer="aiff",
        layout=_AIFF,
        subtype=_AIFC_CODINGS.get(compression, {}).get((bits + 7) // 8),
        channels=channels,
        sample_rate_hz=rate,
        order="little" if compression == b"sowt" else "big",
        start=sound[0],
        size=sound[1],
    )


def _from_extended(exponent: int, mantissa: int) -> int:
    """Turn an 80-bit float, as AIFF has for the rate, into a whole number; one that is no rate becomes 0."""
    return round(math.ldexp(mantissa, exponent - 16383 - 63)) if exponent < 16383 + 32 else 0


def _parse_caf(data: bytes) -> _Header:
    coding: tuple[str | None, int, int, int, Literal["little", "big"]] | None = None
    for chunk in _chunks(data, _CAF, _CAF.first):
        if chunk.id == b"desc":
            rate, name, flags, packet_bytes, _, channels, bits = struct.unpack_from(">d4sIIIII", data, chunk.start)
            codings = (_FLOATS if flags & 1 else _SIGNED) if name == b"lpcm" else _CAF_CODINGS.get(name, {})
            rate_hz = round(rate) if 0 < rate < 2**31 else 0
            coding = codings.get((bits + 7) // 8), channels, packet_bytes, rate_hz, "little" if flags & 2 else "big"
        elif chunk.id == b"data" and coding is not None:
            subtype, channels, packet_bytes, rate, order = coding
            return _Header(
                demuxer="caf",
                layout=_CAF,
                subtype=subtype,
                channels=channels,
                sample_rate_hz=rate,
                order=order,
                start=chunk.start + 4,
                size=None if chunk.size == 2**64 - 1 else max(0, chunk.size - 4),
                stated_bytes=packet_bytes if subtype else 0,
            )
    raise DecodeError("unreadable header", f"no {'data' if coding else 'desc'} chunk")


def _parse_au(data: bytes) -> _Header:
    offset, size, coding, rate, channels = struct.unpack_from(">4xIIIII", data)
    if offset < _AU_HEADER_BYTES:
        raise DecodeError("unreadable header", f"its samples are to begin at byte {offset}, within it")
    return _Header(
        demuxer="au",
        layout=None,
        subtype=_AU_CODINGS.get(coding),
        channels=channels,
        sample_rate_hz=rate,
        order="big",
        start=offset,
        size=None if size == 2**32 - 1 else size,
    )
