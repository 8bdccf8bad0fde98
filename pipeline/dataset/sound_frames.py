"""MPEG audio (MP1, MP2, MP3) and AAC in ADTS: frames one after the other, of which each says its own length.

Going from header to header tells what is there: how many frames, where another stream begins that was joined to the
first, and which bytes are no frames. What an encoder wrote beforehand about the length is only compared with that.

Headers: ISO/IEC 11172-3, section 2.4.2.3, and 13818-7, section 6.2. Gapless data: the LAME project's Info tag.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from pipeline.dataset.sound_decoders import FrameStream
from pipeline.dataset.sound_tags import tag_size
from pipeline.errors import DecodeError

_MPEG_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""The header's two bits of the version, MPEG 1, 2 or 2.5 → what its two bits of the rate mean."""
_ADTS_RATES_HZ = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_KBITS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""(whether it is MPEG 1, layer) → kbit/s by the header's four bits. 0 stands for a free format, which is not read."""
_CODECS = {1: "mp1float", 2: "mp2float", 3: "mp3float"}
AAC = "aac"
_ADTS_HEADER_BYTES = 7
_SILENT_SIDE_INFO = bytes(9)
"""What a frame that holds an encoder's notes instead of sound has behind its header, at least."""

_START = re.compile(rb"\xff[\xe2-\xff][\x00-\xef]|ID3|APETAGEX")
"""What a frame's header or a tag may begin with."""
_CHAIN = 3
"""So many frames that follow one another are no accident."""
_PACKET_FRAMES = 64
"""About 1.5 s: no more is decoded than is wanted, and few packets go through Python."""
_MAX_LOST = 0.02
"""Share of the bytes from the first frame to the last that may be no frames, and of those behind it."""
_MAX_BEFORE_BYTES, _MAX_BEHIND_BYTES = 4_096, 16_384
"""What may be before and behind the frames in any case: frames that were cut, and tags that nobody knows."""
_DECODER_DELAY = 529
"""Samples by which every decoder of layer III is late, in the gapless data's way of counting."""
_GAPLESS_ENCODERS = (b"LAME", b"Lavf", b"Lavc")
"""Whose gapless data counts; FFmpeg believes no others, either."""


class _Kind(NamedTuple):
    """What all frames of a stream have in common."""

    codec: str
    sample_rate_hz: int
    samples: int
    """Of a channel, in one frame; 0 where only decoding tells."""
    variant: int
    """The version of MPEG; the profile and the channels of AAC."""


@dataclass(slots=True)
class _Run:
    """Frames of one kind, without a byte between them."""

    kind: _Kind
    starts: list[int]
    end: int
    is_sure: bool
    """Whether they can't be an accident."""
    lost: int = 0
    """Bytes before them that are neither frames nor tags."""


@dataclass(slots=True)
class _Joined:
    """One of the streams in a file."""

    kind: _Kind
    info: "_Info | None"
    packets: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return sum(frames for _, _, frames in self.packets)


@dataclass(frozen=True, slots=True)
class _Info:
    """What an encoder of layer III said about a stream, in a first frame that holds no sound."""

    frames: int | None
    delay: int | None
    """Samples that the encoder put before the sound; None where it didn't say."""
    padding: int


def frame_streams(data: bytes) -> list[FrameStream]:
    """Returns the streams in a file of MPEG audio or AAC in ADTS, each as long as its frames say.

    Tags and some other bytes before the first frame and behind the last are passed over, and so is a frame that was
    cut.

    Raises:
        DecodeError: there are no frames that follow one another, too many bytes are none, or the file ends long before
            its encoder said, and not with a frame.
    """
    runs, behind = _runs(data)
    first, end = (runs[0].starts[0], runs[-1].end) if runs else (0, 0)
    if not runs or runs[0].lost > max(end - first, _MAX_BEFORE_BYTES):
        raise DecodeError("not audio", f"begins with {data[:8]!r}")
    lost = sum(run.lost for run in runs[1:])
    if lost > _MAX_LOST * (end - first) or behind > max(_MAX_LOST * (end - first), _MAX_BEHIND_BYTES):
        raise DecodeError("corrupt stream", f"{lost + behind} bytes behind the first frame, at {first}, are no frames")
    streams: list[_Joined] = []
    for run in runs:
        info = _info(data, run.starts[0], run.kind)
        if info is not None or not streams or streams[-1].kind != run.kind:
            streams.append(_Joined(run.kind, info))
        streams[-1].packets += _packets(run, skipped=0 if info is None else 1)
    return [_stream(stream, behind > 0 and stream is streams[-1], data) for stream in streams if stream.packets]


def _stream(stream: _Joined, is_cut: bool, data: bytes) -> FrameStream:
    kind, info, there = stream.kind, stream.info, stream.frames * stream.kind.samples
    if not kind.samples or info is None:
        samples = there if kind.samples else None
        return FrameStream(data=data, codec=kind.codec, packets=stream.packets, samples=samples)
    claimed = there if info.frames is None else info.frames * kind.samples
    if is_cut and there < claimed - max(_MAX_LOST * claimed, 0.1 * kind.sample_rate_hz):
        raise DecodeError("cut short", f"{there} of {claimed} samples are there, and bytes that are no frame")
    skip = end = 0
    if info.delay is not None:
        skip = info.delay + _DECODER_DELAY
        # The padding is told from where the encoder stopped; nothing is cut out of what somebody appended.
        end = max(0, there - claimed + info.padding - _DECODER_DELAY) if claimed >= there else 0
    return FrameStream(
        data=data,
        codec=kind.codec,
        packets=stream.packets,
        skip=skip,
        samples=max(0, there - skip - end),
        claimed=max(0, claimed - skip - end),
    )


def _packets(run: _Run, skipped: int) -> Iterator[tuple[int, int, int]]:
    starts = [*run.starts[skipped:], run.end]
    for first in range(0, len(starts) - 1, _PACKET_FRAMES):
        last = min(first + _PACKET_FRAMES, len(starts) - 1)
        yield starts[first], starts[last], last - first


def _runs(data: bytes) -> tuple[list[_Run], int]:
    """Returns every stretch of frames that follow one another, and how many bytes behind the last are no tags."""
    runs: list[_Run] = []
    tags: list[tuple[int, int]] = []
    place = ended = 0
    while place < len(data):
        if size := tag_size(data, place):
            tags.append((place, min(size, len(data) - place)))
            place = ended = place + size
            continue
        if run := _run(data, place, is_lone_enough=place == ended):
            runs.append(run)
        if run and run.is_sure:
            place = ended = run.end
        else:
            found = _START.search(data, place + 1)
            place = found.start() if found else len(data)
    return _without_accidents(runs, tags, len(data))


def _without_accidents(runs: list[_Run], tags: list[tuple[int, int]], end: int) -> tuple[list[_Run], int]:
    """Leave out frames that may be an accident, where they are of another kind than, or overlap, frames that are none.

    Args:
        runs: by where they begin; those that may be an accident may overlap what comes behind them.
        tags: (first byte, bytes), by where they begin.
        end: of the data.
    """
    sure_kinds = {run.kind for run in runs if run.is_sure}
    following, kept = end, list[_Run]()
    for run in reversed(runs):
        if run.is_sure or (run.kind in sure_kinds and run.end <= following):
            kept.append(run)
            following = run.starts[0]
    bounds = [0, *(place for run in reversed(kept) for place in (run.starts[0], run.end)), end]
    gaps = [
        stop - start - sum(size for place, size in tags if start <= place < stop)
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True)
    ]
    return [replace(run, lost=lost) for run, lost in zip(reversed(kept), gaps, strict=False)], gaps[-1]


def _run(data: bytes, place: int, is_lone_enough: bool) -> _Run | None:
    """Returns the frames from `place` on, of which there have to be several unless one is enough."""
    kind = _kind_of(data, place)
    if kind is None:
        return None
    starts, end = _follow_adts(data, place, kind) if kind.codec == AAC else _follow_mpeg(data, place, kind)
    is_sure = len(starts) + (_kind_of(data, end) == kind) >= _CHAIN or (len(starts) > 0 and _is_end(data, end))
    return _Run(kind, starts, end, is_sure) if is_sure or len(starts) > 1 - is_lone_enough else None


def _is_end(data: bytes, place: int) -> bool:
    return place == len(data) or tag_size(data, place) > 0


def _follow_mpeg(data: bytes, place: int, kind: _Kind) -> tuple[list[int], int]:
    """Returns where frames of one kind begin, and where the last one ends, up to the first of another stream."""
    starts: list[int] = []
    length_of, all_bytes = _lengths(data[place + 1], data[place + 2] & 0x0C).get, len(data)
    while (length := length_of(data[place : place + 3])) is not None and place + length <= all_bytes:
        if data[place + 4 : place + 13] == _SILENT_SIDE_INFO and starts and _info(data, place, kind):
            break
        starts.append(place)
        place += length
    return starts, place


def _follow_adts(data: bytes, place: int, kind: _Kind) -> tuple[list[int], int]:
    starts: list[int] = []
    while _kind_of(data, place) == kind:
        length = (data[place + 3] & 3) << 11 | data[place + 4] << 3 | data[place + 5] >> 5
        if not _ADTS_HEADER_BYTES <= length <= len(data) - place:
            break
        starts.append(place)
        place += length
    return starts, place


def _kind_of(data: bytes, place: int) -> _Kind | None:
    """Returns what the frame is whose header stands at `place`; None where there is no header."""
    head = data[place : place + _ADTS_HEADER_BYTES]
    if len(head) == _ADTS_HEADER_BYTES and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        rate = head[2] >> 2 & 15
        channels = (head[2] & 1) << 2 | head[3] >> 6
        is_one_block = head[6] & 3 == 0  # nobody writes more, and FFmpeg doesn't read them
        if rate >= len(_ADTS_RATES_HZ) or not is_one_block:
            return None
        return _Kind(AAC, _ADTS_RATES_HZ[rate], 0, (head[2] >> 6) << 3 | channels)
    parsed = _mpeg_header(head[:3])
    return parsed[0] if parsed else None


@lru_cache(maxsize=4096)
def _mpeg_header(head: bytes) -> tuple[_Kind, int] | None:
    """Returns the kind of a frame of MPEG audio and its length in bytes, from the first three of its header's."""
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, sample_rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or sample_rate == 3:
        return None
    rate = _MPEG_RATES_HZ[version][sample_rate]
    bits_per_second = 1000 * _KBITS[version == 3, layer][bit_rate]
    if layer == 1:
        return _Kind(_CODECS[1], rate, 384, version), (12 * bits_per_second // rate + padding) * 4
    samples = 1152 if layer == 2 or version == 3 else 576
    return _Kind(_CODECS[layer], rate, samples, version), samples // 8 * bits_per_second // rate + padding


@lru_cache(maxsize=64)
def _lengths(second: int, rate: int) -> dict[bytes, int]:
    """Returns the length of a frame by the first three bytes of its header, of all headers of one kind.

    Args:
        second: a header's second byte, which says version and layer.
        rate: the bits of its third byte that say the sample rate.
    """
    heads = (bytes([0xFF, second & ~1 | crc, third | rate]) for crc, third in product((0, 1), range(0x100)))
    return {head: parsed[1] for head in heads if (parsed := _mpeg_header(head)) and head[2] & 0x0C == rate}


def _info(data: bytes, start: int, kind: _Kind) -> _Info | None:
    """Read what an encoder of layer III wrote into a stream's first frame: Xing's, LAME's or Fraunhofer's tag."""
    if kind.codec != _CODECS[3]:
        return None
    if data[start + 36 : start + 42] == b"VBRI\0\1":
        return _Info(int.from_bytes(data[start + 50 : start + 54], "big"), None, 0)
    is_mono = data[start + 3] >> 6 == 3
    side_info = (17 if is_mono else 32) if kind.samples == 1152 else (9 if is_mono else 17)
    place = start + 4 + side_info
    mark, flags = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "big")
    if mark not in (b"Xing", b"Info") or not flags & 3:
        return None
    place += 8
    frames = int.from_bytes(data[place : place + 4], "big") if flags & 1 else None
    place += sum(size for bit, size in enumerate((4, 4, 100, 4)) if flags >> bit & 1)
    if not data[place : place + 4].startswith(_GAPLESS_ENCODERS):
        return _Info(frames, None, 0)
    gapless = int.from_bytes(data[place + 21 : place + 24], "big")
    return _Info(frames, gapless >> 12, gapless & 0xFFF)
