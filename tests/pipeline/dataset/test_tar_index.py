import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.dataset.tar_index import TarMember, iter_members
from pipeline.errors import ShardError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=300).filter(
    lambda name: not name.endswith("/")
)


def make_tar(files: list[tuple[str, bytes]], format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def members(tar: bytes) -> list[TarMember]:
    return list(iter_members(io.BytesIO(tar), "x.tar"))


@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=4),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_lie_where_tarfile_says(files: list[tuple[str, bytes]], format: int) -> None:
    tar = make_tar(files, format)
    with tarfile.open(fileobj=io.BytesIO(tar)) as expected:
        wanted = [(info.name, info.offset_data, info.size) for info in expected]
    assert [(member.name, member.offset, member.size) for member in members(tar)] == wanted


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_are_read_in_every_format(format: int) -> None:
    name = "d" * 100 + "/" + "f" * 80 + ".flac"
    (member,) = members(make_tar([(name, b"sound")], format))
    assert (member.name, member.size, member.refusal) == (name, 5, "")


@pytest.mark.parametrize("name", ["../evil.flac", "/tmp/evil.flac", "a/../../evil.flac", "line\nbreak.flac"])
def test_names_that_lead_outside_are_refused(name: str) -> None:
    (member,) = members(make_tar([(name, b"sound")], tarfile.GNU_FORMAT))
    assert member.refusal == "unsafe name"


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (b"Z", "not an ordinary file"),
    ],
)
def test_only_ordinary_files_are_given(kind: bytes, refusal: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        odd = tarfile.TarInfo("odd.flac")
        odd.type, odd.linkname = kind, "/etc/passwd"
        tar.addfile(odd)
        tar.addfile(tarfile.TarInfo("folder/"))
        folder = tarfile.TarInfo("folder2")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("plain.flac"))
    assert [(member.name, member.refusal) for member in members(stream.getvalue())] == [
        ("odd.flac", refusal),
        ("plain.flac", ""),
    ]


@given(
    st.lists(st.lists(st.binary(max_size=1500), max_size=3), min_size=2, max_size=4),
    st.integers(0, 3000),
    st.sampled_from(FORMATS),
)
@settings(max_examples=60)
def test_tars_behind_an_end_mark_are_read_on(parts: list[list[bytes]], padding: int, format: int) -> None:
    files = [[(f"{part}-{number}.wav", data) for number, data in enumerate(one)] for part, one in enumerate(parts)]
    joined = bytes(padding).join(make_tar(one, format) for one in files) + bytes(padding)
    found = [(member.name, joined[member.offset : member.offset + member.size]) for member in members(joined)]
    assert found == [file for one in files for file in one]


@pytest.mark.parametrize(
    ("junk", "complaint"),
    [
        (b"a signature".ljust(2000, b"."), "no tar header where one should be"),
        (b"short", "cut off within a member's header"),
        (b"\x1f\x8b\x08".ljust(600, b"z"), "compressed with gzip"),
    ],
)
def test_what_is_no_tar_behind_an_end_mark_is_named(junk: bytes, complaint: str) -> None:
    tar = make_tar([("a.wav", b"sound")], tarfile.GNU_FORMAT)
    found = iter_members(io.BytesIO(tar + junk), "x.tar")
    assert next(found).name == "a.wav"
    with pytest.raises(ShardError, match=rf"x\.tar: byte {len(tar)}, behind the end mark of a tar, .*{complaint}"):
        next(found)


def test_a_name_that_is_no_text_is_refused() -> None:
    tar = bytearray(make_tar([("a\udcffb.flac", b"")], tarfile.GNU_FORMAT))
    (member,) = members(bytes(tar))
    assert (member.name, member.refusal) == ("a\\xffb.flac", "name not in UTF-8")


def test_a_member_that_claims_more_than_the_file_has_is_not_given() -> None:
    whole = make_tar([("a.flac", b"x" * 700), ("b.flac", b"y" * 700)], tarfile.USTAR_FORMAT)
    given_members = iter_members(io.BytesIO(whole[:2048]), "cut.tar")
    assert next(given_members).name == "a.flac"
    with pytest.raises(ShardError, match=r"cut\.tar: cut off within the member b'b\.flac'"):
        next(given_members)


def test_an_extended_header_of_gigabytes_is_not_read() -> None:
    class Watched(io.BytesIO):
        most_read = 0

        def read(self, size: int | None = -1) -> bytes:
            Watched.most_read = max(Watched.most_read, size or 0)
            return super().read(size)

    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 5 << 20
    tar = member.tobuf() + b"9 path=a\n" + bytes((5 << 20) - 9) + make_tar([("b.flac", b"")], tarfile.USTAR_FORMAT)
    (found,) = list(iter_members(Watched(tar), "x.tar"))
    assert found.refusal == "oversized extended header"
    assert Watched.most_read <= 1 << 20


@pytest.mark.parametrize(
    "record", [b"0 path=a\n", b"99 path=a\n", b"9 path=ab", b"x path=a\n", b"9 size=-1", b"10 size=1e\n"]
)
def test_a_malformed_extended_header_spoils_its_member_only(record: bytes) -> None:
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, len(record)
    files = make_tar([("b.flac", b"1"), ("c.flac", b"2")], tarfile.USTAR_FORMAT)
    spoilt, good = members(member.tobuf() + record.ljust(512, b"\0") + files)
    assert spoilt.refusal == "malformed extended header"
    assert (good.name, good.refusal) == ("c.flac", "")


def test_two_extended_headers_of_one_member_are_taken_together() -> None:
    size = tarfile.TarInfo("pax")
    size.type, size.size = tarfile.XHDTYPE, 9
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 7
    headers = size.tobuf() + b"9 size=3\n".ljust(512, b"\0") + name.tobuf() + b"b.flac\0".ljust(512, b"\0")
    (member,) = members(headers + make_tar([("short", b"123456")], tarfile.USTAR_FORMAT))
    assert (member.name, member.offset, member.size) == ("b.flac", 2560, 3)


@pytest.mark.parametrize(
    ("magic", "compression"), [(b"\x1f\x8b\x08", "gzip"), (b"BZh9", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")]
)
def test_a_compressed_tar_is_refused_by_name(magic: bytes, compression: str) -> None:
    with pytest.raises(ShardError, match=f"compressed with {compression}.*decompress it first"):
        members(magic.ljust(512, b"\1"))


def test_a_member_may_be_called_like_a_compression() -> None:
    assert [member.name for member in members(make_tar([("BZh.flac", b"")], tarfile.USTAR_FORMAT))] == ["BZh.flac"]


@given(
    st.binary(max_size=2000),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), max_size=6),
    st.integers(0, 10**6),
    st.sampled_from(FORMATS),
)
@example(b"", [], 0, tarfile.PAX_FORMAT)
@settings(max_examples=400)
def test_whatever_is_changed_in_a_tar_ends_in_members_within_it_or_a_shard_error(
    content: bytes, changes: list[tuple[int, bytes]], cut: int, format: int
) -> None:
    tar = bytearray(make_tar([("a" * 90 + ".flac", content), ("é" * 40 + ".json", content)], format))
    for position, patch in changes:
        position %= len(tar)
        tar[position : position + len(patch)] = patch
    del tar[len(tar) - cut % len(tar) :]
    with suppress(ShardError):
        for member in iter_members(io.BytesIO(bytes(tar)), "x.tar"):
            assert 0 <= member.offset <= member.offset + member.size <= len(tar)
            member.name.encode()


def test_a_size_beyond_the_file_or_below_zero_asks_for_no_memory() -> None:
    for size in (8**11 - 1, 2**62, -1):
        member = tarfile.TarInfo("b.flac")
        member.size = size
        header = member.tobuf(format=tarfile.GNU_FORMAT)
        with pytest.raises(ShardError, match=r"cut off within the member b'b\.flac'|has no valid size"):
            members(header + b"sound".ljust(512, b"\0"))
