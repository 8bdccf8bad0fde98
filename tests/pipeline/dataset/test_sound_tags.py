import pytest

from pipeline.dataset.sound_tags import behind_tags, behind_zeros, tag_size

LYRICS = b"LYRICSBEGIN" + b"a line\n" * 9 + b"000074LYRICS200"


@pytest.mark.parametrize(
    ("tag", "size"),
    [
        (b"ID3\x03\0\0\0\0\x01\x02" + bytes(130), 140),
        (b"ID3\x04\0\x10\0\0\0\x05" + bytes(15), 25),  # with a footer
        (b"ID3\x04\0\0\x80\0\0\x05" + bytes(15), 0),  # no size
        (b"TAG" + bytes(125), 128),
        (LYRICS, len(LYRICS)),
        (LYRICS.replace(b"LYRICS200", b"LYRICSEND"), len(LYRICS)),
        (b"LYRICSBEGIN and no end", 22),
        (b"APETAGEX" + bytes(24), 32),
        (b"RIFF", 0),
    ],
)
def test_a_tag_is_as_long_as_it_says(tag: bytes, size: int) -> None:
    assert tag_size(tag, 0) == size
    assert tag_size(b"before" + tag, 6) == size


def test_a_tag_may_end_behind_the_data() -> None:
    assert behind_tags(b"ID3\x03\0\0\0\0\x7f\x7f" + bytes(10)) == 20


def test_tags_and_then_zeros_are_passed_over() -> None:
    tags = b"TAG" + bytes(125) + b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
    assert behind_tags(tags + b"fLaC") == len(tags)
    assert behind_zeros(tags + bytes(7) + b"fLaC", len(tags)) == len(tags) + 7
    assert behind_zeros(b"fLaC", 0) == 0
