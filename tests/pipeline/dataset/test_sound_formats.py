import pytest
from encoded_sounds import by_ffmpeg, noise

from pipeline.dataset.sound_formats import identify
from pipeline.errors import DecodeError


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"FLV\1\5\0\0\0\x09" + bytes(40), "FLV"),
        (b"RIFF\x24\0\0\0AVI LIST" + bytes(40), "AVI"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(40), "WMA"),
        ((b"G" + bytes(187)) * 4, "an MPEG transport stream"),
        (b"wvpk" + bytes(40), "WavPack"),
        (b"#!AMR\n" + bytes(40), "AMR"),
        (b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + b"MAC \x96\x0f", "Monkey's Audio"),
    ],
)
def test_what_is_not_read_is_refused_by_name_with_what_to_do(data: bytes, name: str) -> None:
    with pytest.raises(DecodeError, match=f"unsupported format: {name}.*ffmpeg -i FILE -c copy FILE.mka"):
        identify(data)


def test_an_empty_file_is_no_sound() -> None:
    with pytest.raises(DecodeError, match="empty file"):
        identify(b"")


def test_a_file_may_stand_behind_a_tag_and_zeros() -> None:
    webm = by_ffmpeg(noise(5_000), 48_000, "webm", "libopus")
    tag = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
    assert [identify(before + webm).extension for before in (b"", tag, bytes(999), tag + bytes(99))] == ["webm"] * 4


def test_frames_are_called_by_their_codec() -> None:
    assert identify(by_ffmpeg(noise(9_000), 16_000, "adts", "aac")).extension == "aac"
    assert identify(by_ffmpeg(noise(9_000), 16_000, "mp2", "mp2")).extension == "mp3"
