"""Ids for clips that have none: from the file that they are in, and their place or name there."""

import hashlib
import re
from typing import BinaryIO

from pipeline.dataset.clip_ids import without_extension
from pipeline.storage import files as storage

_BLOCKS = 8
_BLOCK_BYTES = 16 << 10
_DIGITS = 8


def file_mark(stream: BinaryIO, location: str) -> str:
    """Returns what tells a file from all others: its name, and some hex digits of a hash of what it holds.

    The same file has the same mark wherever it lies. Its length and a few blocks, spread over it, stand for the whole.

    Args:
        stream: the file, seekable.
        location: where it is.
    """
    length = stream.seek(0, 2)
    digest = hashlib.sha256(str(length).encode())
    for number in range(_BLOCKS):
        stream.seek(max(0, length - _BLOCK_BYTES) * number // (_BLOCKS - 1))
        digest.update(stream.read(_BLOCK_BYTES))
    return f"{_name(location)}-{digest.hexdigest()[:_DIGITS]}"


def marked(mark: str, name: str, part: int = 0) -> str:
    """Returns the id of a clip that has a name in the file of a mark.

    Args:
        mark: the file's.
        name: the clip's in it.
        part: which of several files, joined to that one, it is in; 0 is the first.
    """
    return f"{mark}/{part}/{name}" if part else f"{mark}/{name}"


def is_marked(clip_id: str, location: str, name: str, part: int = 0) -> bool:
    """Whether a clip's id is `marked` as of a file, whatever that holds now."""
    mark = re.escape(_name(location)) + f"-[0-9a-f]{{{_DIGITS}}}"
    return re.fullmatch(mark + re.escape(marked("", name, part)), clip_id) is not None


def _name(location: str) -> str:
    return without_extension(storage.file_name(location))
