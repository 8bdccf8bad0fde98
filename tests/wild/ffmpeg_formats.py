"""The formats that people have, as FFmpeg's command line writes and reads them: the bench's independent decoder."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ANY = frozenset({8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 192_000})
UP_TO_48 = ANY - {192_000}
OF_OPUS = frozenset({8_000, 16_000, 48_000})
OF_AC3 = frozenset({44_100, 48_000})
MONO_STEREO = frozenset({1, 2})
UP_TO_5_1 = frozenset({1, 2, 6})
UP_TO_7_1 = UP_TO_5_1 | {8}

LOSSLESS = 2**-24
"""FFmpeg rounds some of what has more bits than a float32; everything else is equal."""
LOSSY = 1e-5
"""What two builds of one decoder in float may differ by."""
_EXTENSIONS = {"mp4": "m4a", "mov": "m4a", "mp2": "mp3"}
"""How a file was called → what its content is known as, where that differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to keep a sound, and what of it has to come back."""

    row: str
    """Of the table in docs/ingest.md, "What can be read"."""
    name: str
    """Of the file; no other has it."""
    arguments: str
    """Of FFmpeg's command line, to write it."""
    extension: str
    """What the content is known as."""
    rates: frozenset[int] = ANY
    channels: frozenset[int] = UP_TO_7_1
    is_exact: bool = True
    """Whether the very number of samples comes back; where not, there are as many as FFmpeg finds."""
    tolerance: float = LOSSLESS
    """Largest difference from FFmpeg's samples; full scale is 1."""
    reader: tuple[str, ...] = ()
    """Arguments of FFmpeg's command line, to read it."""
    least: int = 1
    """Files with fewer samples are no comparison."""


def _formats(row: str, files: dict[str, str], **settings: Any) -> list[Format]:
    """Formats of one row: name of the file → arguments."""
    formats = []
    for name, arguments in files.items():
        suffix = name.rpartition(".")[2]
        extension = _EXTENSIONS.get(suffix, suffix)
        formats.append(Format(row=row, name=name, arguments=arguments, extension=extension, **settings))
    return formats


def _pcm(row: str, extension: str, codecs: str, options: str = "", **settings: Any) -> list[Format]:
    """Formats that code each sample by itself, one for each of FFmpeg's names."""
    files = {f"{codec}{options.partition(' ')[0]}.{extension}": f"-c:a {codec} {options}" for codec in codecs.split()}
    return _formats(row, files, **settings)


_PLAIN = "WAV, RF64, Wave64, AIFF, AIFC, CAF, AU"
_CODED = "the same with ADPCM, GSM, ALAC or MP3 in them"
_MP4, _MATROSKA = "MP4, M4A, QuickTime", "WebM, Matroska"
_LITTLE = "pcm_u8 pcm_s16le pcm_s24le pcm_s32le pcm_f32le pcm_f64le pcm_mulaw pcm_alaw"
_BIG = "pcm_s8 pcm_s16be pcm_s24be pcm_s32be pcm_f32be pcm_f64be pcm_mulaw pcm_alaw"
_LIKE_FFMPEG: dict[str, Any] = {"is_exact": False, "tolerance": LOSSY}
_ADPCM: dict[str, Any] = {"is_exact": False, "channels": MONO_STEREO}
_MP3: dict[str, Any] = {"tolerance": LOSSY, "rates": UP_TO_48, "channels": MONO_STEREO, "least": 48}
"""LAME fills up what is shorter."""
_OPUS: dict[str, Any] = {
    "tolerance": LOSSY,
    "rates": OF_OPUS,
    # FFmpeg's own decoder is no measure, and 16 bits cut off what overshoots.
    "reader": ("-c:a", "libopus", "-request_sample_fmt", "flt"),
}
_UNRECOGNISED = 4_000
"""FFmpeg's command line doesn't know what a shorter file is."""
_SEVERAL_PACKETS = 1_000
"""Of a stream of one packet, FFmpeg takes only one end off."""

FORMATS: tuple[Format, ...] = (
    *_pcm(_PLAIN, "wav", _LITTLE),
    *_pcm(_PLAIN, "wav", "pcm_s16le pcm_s24le", "-rf64 always"),
    *_pcm(_PLAIN, "w64", _LITTLE, is_exact=False),  # FFmpeg counts what it fills up with, and so do we
    *_pcm(_PLAIN, "aiff", _BIG),
    *_pcm(_PLAIN, "aiff", "pcm_s16le"),
    *_pcm(_PLAIN, "caf", "pcm_s8 pcm_s16be pcm_s24le pcm_s32le pcm_f32le pcm_f64be pcm_mulaw pcm_alaw"),
    *_pcm(_PLAIN, "au", _BIG),
    *_formats(_CODED, {"ima.wav": "-c:a adpcm_ima_wav"}, **_ADPCM, tolerance=2e-3),  # FFmpeg before 6 rounds otherwise
    *_formats(_CODED, {"microsoft.wav": "-c:a adpcm_ms", "yamaha.wav": "-c:a adpcm_yamaha"}, **_ADPCM),
    *_formats(_CODED, {"ima.aiff": "-c:a adpcm_ima_qt", "ima.caf": "-c:a adpcm_ima_qt"}, **_ADPCM),
    *_formats(_CODED, {"gsm.wav": "-c:a libgsm_ms"}, **_ADPCM | {"channels": frozenset({1})}, rates=frozenset({8_000})),
    *_formats(_CODED, {"alac.caf": "-c:a alac"}, channels=UP_TO_5_1),
    *_formats(_CODED, {"mp3.wav": "-c:a libmp3lame"}, **_MP3, is_exact=False),
    *_formats("FLAC", {"16.flac": "-c:a flac -sample_fmt s16", "24.flac": "-c:a flac -sample_fmt s32"}),
    *_formats("Ogg Vorbis", {"vorbis.ogg": "-c:a libvorbis"}, tolerance=LOSSY),
    *_formats("Ogg Opus", {"opus.opus": "-c:a libopus"}, **_OPUS),
    *_formats("Ogg FLAC, Speex", {"flac.oga": "-c:a flac"}),
    *_formats("Ogg FLAC, Speex", {"speex.ogg": "-c:a libspeex"}, **_ADPCM, rates=OF_OPUS - {48_000}),
    *_formats("MP3, MP2", {"constant.mp3": "-c:a libmp3lame", "variable.mp3": "-c:a libmp3lame -q:a 4"}, **_MP3),
    *_formats(
        "MP3, MP2", {"uncounted.mp3": "-c:a libmp3lame -q:a 4 -write_xing 0 -id3v2_version 0"}, **_MP3, is_exact=False
    ),
    *_formats(
        "MP3, MP2",
        {"layer2.mp2": "-c:a mp2"},
        **_LIKE_FFMPEG,
        rates=frozenset({16_000, 22_050, 44_100, 48_000}),
        channels=MONO_STEREO,
        reader=("-c:a", "mp2float"),
        least=_UNRECOGNISED,
    ),
    *_formats("AAC in ADTS", {"adts.aac": "-c:a aac"}, **_LIKE_FFMPEG, rates=UP_TO_48, least=_UNRECOGNISED),
    *_formats(
        _MP4,
        {"aac.m4a": "-c:a aac", "fragments.mp4": "-c:a aac -movflags frag_keyframe+empty_moov"},
        **_LIKE_FFMPEG,
        rates=UP_TO_48,
    ),
    *_formats(_MP4, {"flac.mp4": "-c:a flac -strict -2"}),
    *_formats(_MP4, {"alac.m4a": "-c:a alac"}, channels=UP_TO_5_1),
    *_formats(_MP4, {"opus.mp4": "-c:a libopus -strict -2"}, **_OPUS, is_exact=False, least=_SEVERAL_PACKETS),
    *_formats(_MP4, {"mp3.mp4": "-c:a libmp3lame"}, **_MP3 | {"rates": UP_TO_48 - {8_000, 11_025}}, is_exact=False),
    *_formats(_MP4, {"ac3.mp4": "-c:a ac3"}, **_LIKE_FFMPEG, rates=OF_AC3, channels=UP_TO_5_1),
    *_formats(_MP4, {"ima.mov": "-c:a adpcm_ima_qt"}, **_ADPCM),
    *_pcm(_MP4, "mov", "pcm_s16le pcm_s24be pcm_mulaw"),
    *_formats(_MATROSKA, {"opus.webm": "-c:a libopus", "opus.mka": "-c:a libopus"}, **_OPUS, least=_SEVERAL_PACKETS),
    *_formats(_MATROSKA, {"vorbis.webm": "-c:a libvorbis"}, **_LIKE_FFMPEG),
    *_formats(_MATROSKA, {"aac.mka": "-c:a aac"}, **_LIKE_FFMPEG, rates=UP_TO_48),
    *_formats(_MATROSKA, {"mp3.mka": "-c:a libmp3lame"}, **_MP3, is_exact=False),
    *_formats(_MATROSKA, {"flac.mka": "-c:a flac"}),
    *_formats(_MATROSKA, {"alac.mka": "-c:a alac"}, channels=UP_TO_5_1),
    *_pcm(_MATROSKA, "mka", "pcm_s16le pcm_f32le"),
    *_formats(
        _MATROSKA,
        {"ac3.mka": "-c:a ac3", "eac3.mka": "-c:a eac3", "dts.mka": "-c:a dca -strict -2"},
        **_LIKE_FFMPEG,
        rates=OF_AC3,
        channels=UP_TO_5_1,
    ),
)
"""Another way to keep a sound is another line here, and a row of docs/ingest.md where it is of a new kind."""


@cache
def ffmpeg() -> str:
    """Path of FFmpeg's command line; the test skips where there is none."""
    found = shutil.which("ffmpeg")
    if found is None:
        pytest.skip("ffmpeg is not installed: `apt-get install ffmpeg`, or `make ffmpeg` as root")
    return found


def write_all(formats: Sequence[Format], samples: np.ndarray, rate: int, folder: Path) -> dict[Format, Path]:
    """Encode (samples, channels) float32 in every format with one process."""
    raw = folder / "source.f32"
    samples.tofile(raw)
    paths = {format: folder / format.name for format in formats}
    outputs = [
        [*format.arguments.split(), "-threads", "1", "-fflags", "+bitexact", str(path)]
        for format, path in paths.items()
    ]
    source = ["-f", "f32le", "-ar", str(rate), "-ac", str(samples.shape[1]), "-i", str(raw)]
    _run([*source, *(word for output in outputs for word in output)])
    return paths


def read_all(paths: dict[Format, Path], channels: int) -> dict[Format, np.ndarray]:
    """Decode every file with one process: format → (samples, channels), float32."""
    inputs = [[*format.reader, "-threads", "1", "-i", str(path)] for format, path in paths.items()]
    outputs = [["-map", f"{n}:a", "-f", "f32le", f"{path}.f32"] for n, path in enumerate(paths.values())]
    _run([word for words in (*inputs, *outputs) for word in words])
    return {format: np.fromfile(f"{path}.f32", np.float32).reshape(-1, channels) for format, path in paths.items()}


def _run(arguments: Sequence[str]) -> None:
    command = [ffmpeg(), "-v", "error", "-nostdin", "-y", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
