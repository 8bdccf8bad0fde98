"""FLAC: how many samples its frames hold, whatever its header says.

A tool that copies frames leaves the header's number as it was, one that writes into a pipe leaves 0, and libFLAC then
stops too early or fails at the end. The first and the last frame say where in the stream they stand.

The format: RFC 9639, sections 8.2 (streaminfo) and 9.1 (frame header).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pipeline.dataset.mapped_sound import MappedSound
from pipeline.dataset.sound_decoders import SndfileStream
from pipeline.errors import DecodeError

_MARK = re.compile(rb"fLaC[\0\x80]\0\0\x22")
"""The beginning of a stream, with the header of streaminfo behind it."""
_LATER_MARK = b"fLaC\0\0\0\x22"
_INFO_BYTES = slice(8, 42)
_COUNT_BYTES, _COUNT_BITS = slice(18, 26), 36
"""Where the number of samples is: in the lowest bits."""
_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_RATES_HZ = (88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
"""By the frame header's four bits, from 1 on."""
_SAMPLE_BITS = {1: 8, 2: 12, 4: 16, 5: 20, 6: 24, 7: 32}
_SIZES_BEHIND = {6: 1, 7: 2}
_RATES_BEHIND = {12: (1, 1000), 13: (2, 1), 14: (2, 10)}
"""The bits of what is written out behind the number → its bytes, and the unit of a rate in Hz."""


@dataclass(frozen=True, slots=True)
class _Info:
    """What streaminfo says."""

    block_samples: int
    sample_rate_hz: int
    channels: int
    bits: int
    samples: int

    @classmethod
    def read(cls, data: bytes) -> "_Info":
        info = data[_INFO_BYTES]
        numbers = int.from_bytes(data[_COUNT_BYTES], "big")
        return cls(
            block_samples=int.from_bytes(info[2:4], "big"),
            sample_rate_hz=numbers >> 44,
            channels=(numbers >> 41 & 7) + 1,
            bits=(numbers >> 36 & 31) + 1,
            samples=numbers & (1 << _COUNT_BITS) - 1,
        )


def flac_streams(data: bytes) -> list[SndfileStream]:
    """Returns the streams that were joined into one file, most often it alone.

    Raises:
        DecodeError: a stream is cut within its header, or no frame fits the header.
    """
    starts: list[int] = []
    end = len(data)
    while (found := data.rfind(_LATER_MARK, 1, end)) > 0:  # backwards, which Python does twice as fast
        starts.insert(0, found)
        end = found
    return [_stream(data[start:end] if starts else data) for start, end in pairwise([0, *starts, len(data)])]


def _stream(data: bytes) -> SndfileStream:
    if not _MARK.match(data) or len(data) < _INFO_BYTES.stop:
        raise DecodeError("unreadable header", "it does not begin with streaminfo")
    info = _Info.read(data)
    frames = _behind_metadata(data)
    first = _Frame.read(data, frames, info)
    if frames == len(data):
        raise DecodeError("no samples")
    last = next(_backwards(data, frames, info), None)
    if first is None or last is None:
        raise DecodeError("corrupt stream", "its frames do not fit its header")
    samples = last.start + last.samples - first.start
    if samples <= 0:
        raise DecodeError("corrupt stream", f"its last frame begins at sample {last.start}, its first at {first.start}")
    if samples != info.samples:
        data = _with_count(data, samples)
    return SndfileStream(data=data, samples=samples, claimed=info.samples or None)


def _behind_metadata(data: bytes) -> int:
    place, is_last = 4, False
    while not is_last and place + 4 <= len(data):
        is_last = data[place] >= 0x80
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    return min(place, len(data))


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame's place in the stream, in samples of a channel."""

    start: int
    samples: int

    @classmethod
    def read(cls, data: bytes, place: int, info: _Info) -> "_Frame | None":
        """Read a frame's header; None where none stands that fits streaminfo."""
        head = data[place : place + 16]
        if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[3] & 1:
            return None
        size_bits, rate_bits, channel_bits, sample_bits = head[2] >> 4, head[2] & 15, head[3] >> 4, head[3] >> 1 & 7
        number, place = _coded_number(head, 4)
        size_bytes = _SIZES_BEHIND.get(size_bits, 0)
        samples, place = int.from_bytes(head[place : place + size_bytes], "big") + 1, place + size_bytes
        rate_bytes, unit = _RATES_BEHIND.get(rate_bits, (0, 0))
        rate, place = int.from_bytes(head[place : place + rate_bytes], "big") * unit, place + rate_bytes
        if number is None or place >= len(head) or _crc8(head[:place]) != head[place]:
            return None
        if not size_bytes:
            samples = 192 if size_bits == 1 else 576 << size_bits - 2 if size_bits < 6 else 256 << size_bits - 8
        if not rate_bytes:
            rate = _RATES_HZ[rate_bits - 1] if 1 <= rate_bits <= 11 else info.sample_rate_hz
        channels = channel_bits + 1 if channel_bits < 8 else 2
        bits = _SAMPLE_BITS.get(sample_bits, info.bits)
        if size_bits == 0 or (rate, channels, bits) != (info.sample_rate_hz, info.channels, info.bits):
            return None
        is_numbered_by_sample = head[1] & 1
        return cls(number if is_numbered_by_sample else number * info.block_samples, samples)


def _backwards(data: bytes, first: int, info: _Info) -> Iterator[_Frame]:
    """Yields the frames from the last one on; what looks like one by accident has a checksum against it."""
    end = len(data)
    while (place := max(data.rfind(b"\xff\xf8", first, end), data.rfind(b"\xff\xf9", first, end))) >= 0:
        if frame := _Frame.read(data, place, info):
            yield frame
        end = place + 1


def _coded_number(head: bytes, place: int) -> tuple[int | None, int]:
    """Read a number coded as UTF-8 codes characters, of up to 36 bits; gives it, and the place behind it."""
    lead = head[place]
    if lead < 0x80:
        return lead, place + 1
    more = next((count for count in range(1, 7) if lead >> (6 - count) & 1 == 0), 0) if lead >= 0xC0 else 0
    following = head[place + 1 : place + 1 + more]
    if not more or any(byte & 0xC0 != 0x80 for byte in following):
        return None, place + 1
    number = lead & (1 << (6 - more)) - 1
    for byte in following:
        number = number << 6 | byte & 0x3F
    return number, place + 1 + more


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc


def _with_count(data: bytes, samples: int) -> bytes:
    numbers = int.from_bytes(data[_COUNT_BYTES], "big") >> _COUNT_BITS << _COUNT_BITS | samples
    if isinstance(data, MappedSound):
        data[_COUNT_BYTES] = numbers.to_bytes(8, "big")
        return data
    return data[: _COUNT_BYTES.start] + numbers.to_bytes(8, "big") + data[_COUNT_BYTES.stop :]
