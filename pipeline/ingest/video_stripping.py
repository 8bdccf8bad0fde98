"""Drops the video beside a sound; the sound's own bytes stay as they are."""

import io
from dataclasses import dataclass
from typing import Any

import av

from pipeline.dataset.audio import SoundFacts, inspect_sound
from pipeline.errors import DecodeError

_MUXERS = {"mp4": "mp4", "mkv": "matroska", "webm": "webm", "ogg": "ogg", "opus": "ogg", "oga": "ogg"}
"""Format of a sound with a video → FFmpeg's name of what writes it."""


@dataclass(frozen=True, slots=True)
class VideoStripping:
    """Copies the sound of a file into a file of its own, of the same kind; one without a video keeps its bytes."""

    def __call__(self, audio: bytes, facts: SoundFacts) -> bytes:
        """Returns a file with nothing but the sound. Equal files give equal bytes, of one version of FFmpeg.

        Raises:
            DecodeError: the sound can't be copied so that it decodes to as many samples as before.
        """
        if not facts.has_video:
            return audio
        try:
            stripped = _copy_sound(audio, _MUXERS[facts.format])
        except (av.FFmpegError, ValueError) as error:
            raise DecodeError("video can't be dropped", str(error)) from error
        frames = inspect_sound(stripped).frames
        if frames != facts.frames:
            raise DecodeError("video can't be dropped", f"{frames} of {facts.frames} samples would be left")
        return stripped


def _copy_sound(audio: bytes, muxer: str) -> bytes:
    stripped = io.BytesIO()
    demuxer = "matroska" if muxer == "webm" else muxer
    # Without the option the muxers write their version, the time and random numbers.
    target: Any = av.open(stripped, "w", format=muxer, options={"fflags": "+bitexact"})
    source: Any = av.open(io.BytesIO(audio), format=demuxer)
    with source, target:
        sound = source.streams.best("audio")
        copy = target.add_stream_from_template(sound)
        for packet in source.demux(sound):
            if packet.dts is not None:  # the last one only says that there are no more
                packet.stream = copy
                target.mux(packet)
    return stripped.getvalue()
