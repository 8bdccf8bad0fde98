"""Which format a file is, told by its content alone, and which of the decoders reads it.

The choice of decoder was made by measured exactness and speed: docs/ingest.md, "Which decoder". libsndfile reads what
codes each sample by itself, and FLAC; FFmpeg reads everything else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.dataset.flac_stream import flac_streams
from pipeline.dataset.media_boxes import is_webm, matroska_streams, mp4_streams
from pipeline.dataset.ogg import begins_with, ogg_streams
from pipeline.dataset.sound_chunks import chunk_streams
from pipeline.dataset.sound_decoders import EncodedStream
from pipeline.dataset.sound_frames import AAC, frame_streams
from pipeline.dataset.sound_tags import behind_tags, behind_zeros
from pipeline.errors import DecodeError


class EncodedSound(NamedTuple):
    """A file, and what is in it."""

    extension: str
    """What it should be called."""
    video_extension: str
    """What it should be called if there is a video beside the sound."""
    streams: Sequence[EncodedStream]
    """One, or as many as were joined, to be heard one after the other."""


Opener = Callable[[bytes], EncodedSound]


def identify(data: bytes) -> EncodedSound:
    """Returns what a file is. Tags and zeros may stand before it, junk before frames that stand for themselves.

    Raises:
        DecodeError: it is no sound, none that can be read, or its structure shows that a part of it is missing.
    """
    if not data:
        raise DecodeError("empty file")
    tags_end = behind_tags(data)
    for place in sorted({0, tags_end, behind_zeros(data, tags_end)}):
        for offset, signature, open_sound in _SIGNATURES:
            if data.startswith(signature, place + offset):
                return open_sound(data[place:] if place else data)
        for marks, name in _FOREIGN_MARKS:
            if all(data.startswith(mark, place + offset) for offset, mark in marks.items()):
                raise DecodeError("unsupported format", f"{name}; `ffmpeg -i FILE -c copy FILE.mka` wraps it readably")
    return _open_frames(data)


def _open_frames(data: bytes) -> EncodedSound:
    streams = frame_streams(data)
    extension = "aac" if streams and streams[0].codec == AAC else "mp3"
    return EncodedSound(extension, extension, streams)


def _open_ogg(data: bytes) -> EncodedSound:
    streams = ogg_streams(data)
    extension = next((name for mark, name in _OGG_EXTENSIONS.items() if begins_with(data, mark)), "ogg")
    return EncodedSound(extension, extension, streams)


def _open_matroska(data: bytes) -> EncodedSound:
    extensions = ("webm", "webm") if is_webm(data) else ("mka", "mkv")
    return EncodedSound(*extensions, matroska_streams(data))


def _opener(extension: str, streams: Callable[[bytes], Sequence[EncodedStream]], video: str = "") -> Opener:
    return lambda data: EncodedSound(extension, video or extension, streams(data))


_OGG_EXTENSIONS = {b"OpusHead": "opus", b"\x7fFLAC": "oga"}
_OPEN_WAV, _OPEN_MP4 = _opener("wav", chunk_streams), _opener("m4a", mp4_streams, video="mp4")
_SIGNATURES: tuple[tuple[int, bytes, Opener], ...] = (
    (8, b"WAVE", _OPEN_WAV),  # behind RIFF, RIFX, RF64 or BW64 and a length
    (0, b"riff\x2e\x91\xcf\x11", _opener("w64", chunk_streams)),
    (0, b"fLaC", _opener("flac", flac_streams)),
    (0, b"OggS", _open_ogg),
    (8, b"AIFF", _opener("aiff", chunk_streams)),
    (8, b"AIFC", _opener("aiff", chunk_streams)),
    (0, b".snd", _opener("au", chunk_streams)),
    (0, b"caff", _opener("caf", chunk_streams)),
    (4, b"ftyp", _OPEN_MP4),
    (4, b"moov", _OPEN_MP4),  # QuickTime before it had ftyp
    (4, b"mdat", _OPEN_MP4),
    (4, b"wide", _OPEN_MP4),
    (0, b"\x1a\x45\xdf\xa3", _open_matroska),
)
"""(place, what stands there, how the file is read)."""
_FOREIGN_MARKS: tuple[tuple[dict[int, bytes], str], ...] = (
    ({0: b"FLV\1"}, "FLV"),
    ({0: b"RIFF", 8: b"AVI "}, "AVI"),
    ({0: b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"}, "WMA or another ASF"),
    ({0: b"\0\0\1\xba"}, "an MPEG program stream"),
    ({0: b"G", 188: b"G", 376: b"G"}, "an MPEG transport stream"),
    ({0: b"MAC "}, "Monkey's Audio"),
    ({0: b"wvpk"}, "WavPack"),
    ({0: b"TTA1"}, "True Audio"),
    ({0: b"#!AMR"}, "AMR"),
    ({0: b"\x0b\x77"}, "AC-3"),
    ({0: b".RMF"}, "RealMedia"),
    ({0: b"MPCK"}, "Musepack"),
    ({0: b"MP+"}, "Musepack"),
    ({0: b"DSD "}, "DSF"),
)
"""(place → what stands there, what it is), of what is not read: nothing here could tell whether it is cut or joined."""
