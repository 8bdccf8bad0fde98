"""Encodes sounds as their writers do, in memory: with libsndfile, and with the FFmpeg libraries that PyAV brings."""

import io
from typing import Any

import av
import numpy as np
import soundfile


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(samples, channels) float32; no two parts are alike, so what is lost or late shows."""
    rng = np.random.default_rng(seed)
    return (0.25 * rng.standard_normal((samples, channels))).clip(-0.99, 0.99).astype(np.float32)


def by_sndfile(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    """An encoded file of (samples,) or (samples, channels)."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


def by_ffmpeg(
    samples: np.ndarray,
    rate: int,
    container: str,
    codec: str,
    *,
    video: str | None = None,
    codec_options: dict[str, str] | None = None,
    seekable: bool = True,
    options: dict[str, str] | None = None,
) -> bytes:
    """An encoded file of (samples, channels), with a picture of a few frames beside it if a video codec is given.

    What is not seekable is written as into a pipe: no header is mended at the end. `options` are the container's.
    """
    stream = io.BytesIO() if seekable else _Pipe()
    output: Any = av.open(stream, "w", format=container, options={"fflags": "+bitexact", **(options or {})})
    with output:
        sound = output.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo", 8: "7.1"}[samples.shape[1]])
        sound.options = {"strict": "-2", **(codec_options or {})}
        picture = output.add_stream(video, rate=25) if video else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            for number in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8))
                frame.pts = number
                output.mux(picture.encode(frame))
            output.mux(picture.encode(None))
        resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "flt", sound.layout)
        frame.sample_rate, frame.pts = rate, 0
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(sound.encode(piece))
    return stream.getvalue()


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *arguments: int) -> int:
        raise OSError("a pipe")
