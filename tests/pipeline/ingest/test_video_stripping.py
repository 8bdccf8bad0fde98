import numpy as np
import pytest
from encoded_sounds import by_ffmpeg, by_sndfile, noise

from pipeline.dataset.audio import decode, inspect_sound
from pipeline.errors import DecodeError
from pipeline.ingest.video_stripping import VideoStripping

KINDS = [
    ("mp4", "aac", "mpeg4", {}, "m4a"),
    ("mp4", "aac", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}, "m4a"),
    ("mov", "pcm_s16le", "mpeg4", {}, "m4a"),
    ("matroska", "aac", "mpeg4", {}, "mka"),
    ("matroska", "flac", "mpeg4", {}, "mka"),
    ("webm", "libopus", "libvpx", {}, "webm"),
]


def with_video(container: str, codec: str, video: str, options: dict[str, str]) -> bytes:
    return by_ffmpeg(noise(30_000, 2), 48_000, container, codec, video=video, options=options)


@pytest.mark.parametrize(("container", "codec", "video", "options", "extension"), KINDS)
def test_the_sound_stays_to_the_last_sample_and_the_video_goes(
    container: str, codec: str, video: str, options: dict[str, str], extension: str
) -> None:
    data = with_video(container, codec, video, options)
    facts = inspect_sound(data)
    stripped = VideoStripping()(data, facts)
    assert len(stripped) < len(data)
    left = inspect_sound(stripped)
    assert (left.format, left.has_video, left.frames) == (extension, False, facts.frames)
    np.testing.assert_array_equal(decode(stripped).samples, decode(data).samples)


def test_equal_files_give_equal_bytes() -> None:
    for container, codec, video, options, _ in KINDS:
        data = with_video(container, codec, video, options)
        assert VideoStripping()(data, inspect_sound(data)) == VideoStripping()(data, inspect_sound(data))


@pytest.mark.parametrize(
    "data", [by_ffmpeg(noise(30_000), 48_000, "mp4", "aac"), by_sndfile(noise(3_000), 16_000, "FLAC")]
)
def test_a_sound_without_a_video_keeps_its_bytes(data: bytes) -> None:
    assert VideoStripping()(data, inspect_sound(data)) is data


def test_joined_videos_are_refused_and_not_cut_to_the_first() -> None:
    data = 2 * with_video(*KINDS[0][:4])
    with pytest.raises(DecodeError, match=r"video can't be dropped: \d+ of \d+ samples would be left"):
        VideoStripping()(data, inspect_sound(data))
