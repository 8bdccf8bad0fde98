"""Where the members of a tar lie, without trusting the tar.

Python's `tarfile` reads whatever size a header of extended names claims and keeps every member it has seen. This reader
takes the same formats (ustar, GNU and pax names) with bounded memory, and says of each member that it won't give why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.dataset.clip_ids import is_safe_name
from pipeline.errors import ShardError

_BLOCK = 512
_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 1 << 20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REFUSED_TYPES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe"}
_FOLDER = b"5"
_FILE_TYPES = (b"0", b"\0", b"7")


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member of a tar."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    size: int
    """Bytes."""
    refusal: str = ""
    """Why nobody should use it; empty for an ordinary file."""
    part: int = 0
    """How many end marks of tars stand before it: the file's part, where tars were joined."""


def iter_members(stream: BinaryIO, where: str) -> Iterator[TarMember]:
    """Yields the members of an uncompressed tar in order, folders left out.

    A tar that follows another one's end mark, as `cat a.tar b.tar` joins them, is read on; zeros behind the last one
    are padding. Between two members the stream may be read or moved by the caller; the tar's own place is kept.

    Args:
        stream: a seekable stream of the tar.
        where: what messages call it.

    Raises:
        ShardError: the stream is no tar, is compressed, damaged, ends within a member, or holds something else than
            tars behind an end mark; the members before that have been given.
    """
    length = stream.seek(0, 2)
    if length == 0:
        raise ShardError(f"{where}: empty file, not even the end mark of a tar")
    offset, part, extended, behind = 0, 0, _Extended(), ""
    while offset + _BLOCK <= length:
        stream.seek(offset)
        header = _Header(stream.read(_BLOCK), f"{where}: byte {offset}{behind}")
        if header.is_end:
            offset, part, extended = _end_of_zeros(stream, offset + _BLOCK), part + 1, _Extended()
            behind = f", behind the end mark of a tar, with {length - offset} bytes left"
            continue
        describes_next = header.kind in b"xgLK"
        data, size = offset + _BLOCK, header.size if header.has_data else 0
        if extended.size is not None and header.has_data and not describes_next:
            size = extended.size
        offset = data + -(-size // _BLOCK) * _BLOCK
        if data + size > length:
            raise ShardError(f"{where}: cut off within the member {extended.name or header.name!r}")
        if describes_next:
            extended.read(header.kind, stream.read(min(size, _MAX_NAME_BYTES)), size)
            continue
        name = extended.name or header.name
        if header.kind != _FOLDER and not name.endswith(b"/"):
            text = name.decode("utf-8", "backslashreplace")
            yield TarMember(text, data, size, _refusal(name, header.kind, extended), part)
        extended = _Extended()
    if offset < length:
        raise ShardError(f"{where}: byte {offset}{behind}: cut off within a member's header")


def _end_of_zeros(stream: BinaryIO, offset: int) -> int:
    """Returns the place of the first byte from `offset` on that isn't zero, or else the stream's end."""
    stream.seek(offset)
    while chunk := stream.read(_CHUNK_BYTES):
        if rest := chunk.lstrip(b"\0"):
            return offset + len(chunk) - len(rest)
        offset += len(chunk)
    return offset


def _refusal(name: bytes, kind: bytes, extended: "_Extended") -> str:
    if extended.fault:
        return extended.fault
    if kind not in _FILE_TYPES:
        return _REFUSED_TYPES.get(kind, "not an ordinary file")
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return "name not in UTF-8"
    return "" if is_safe_name(text.removeprefix("./"), "/") else "unsafe name"


class _Header:
    """One header block: a member's name, size and kind."""

    def __init__(self, block: bytes, where: str) -> None:
        self.is_end = not block.strip(b"\0")
        if self.is_end:
            return
        # The checksum is taken with its own field as spaces.
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if _number(block[148:156]) != checksum:
            raise ShardError(f"{where}: {_what_instead(block)}")
        self.kind = block[156:157]
        self.name = block[:100].split(b"\0", 1)[0]
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix and block[257:263] == b"ustar\0":  # GNU's magic is `ustar  `, and keeps other things there
            self.name = prefix + b"/" + self.name
        self.has_data = self.kind not in b"123456"
        size = _number(block[124:136])
        if size is None or (size < 0 and self.has_data):
            raise ShardError(f"{where}: the header of {self.name!r} has no valid size")
        self.size = size


def _what_instead(block: bytes) -> str:
    for magic, compression in _COMPRESSIONS.items():
        if block.startswith(magic):
            return f"compressed with {compression}; clips are read in place, so decompress it first"
    return "no tar header where one should be"


def _number(field: bytes) -> int | None:
    if field[0] in (0x80, 0xFF):  # GNU's base 256, for what octal digits can't hold
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits or b"0", 8) if digits.isdigit() or not digits else None
    except ValueError:
        return None


class _Extended:
    """What GNU and pax headers say about the member that follows them."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.fault = ""

    def read(self, kind: bytes, data: bytes, size: int) -> None:
        if size > _MAX_NAME_BYTES:
            self.fault = "oversized extended header"
        elif kind == b"L":
            self.name = data.split(b"\0", 1)[0]
        elif kind == b"x":
            self._read_pax(data)
        # `K` is the target of a link and `g` holds for the whole archive: neither names or sizes a file.

    def _read_pax(self, data: bytes) -> None:
        """Read records of the form `<length> <key>=<value>` and a line feed; the length counts the whole record."""
        start = 0
        while start < len(data) and data[start] != 0:
            digits = data[start : start + 8].partition(b" ")[0]
            end = start + (int(digits) if digits.isdigit() else 0)
            record = data[start + len(digits) + 1 : end]
            key, equals, value = record[:-1].partition(b"=")
            if end > len(data) or not equals or not record.endswith(b"\n"):
                self.fault = "malformed extended header"
                return
            self._take(key, value)
            start = end

    def _take(self, key: bytes, value: bytes) -> None:
        if key == b"path":
            self.name = value
        elif key == b"size" and value.isdigit() and len(value) < 20:
            self.size = int(value)
        elif key == b"size":
            self.fault = "malformed extended header"
        elif key.startswith(b"GNU.sparse"):
            self.fault = "sparse file"
