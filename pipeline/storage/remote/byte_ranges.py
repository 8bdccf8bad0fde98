"""Byte ranges of remote files, many at a time; near ones of a file share a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.storage.remote.calls import Action, call_each
from pipeline.storage.remote.failures import status_of

MERGE_GAP_BYTES = 64 << 10
"""Ranges of one file that lie closer than this share a request, which costs as much as some hundred kB."""
_MAX_MERGED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A stretch of a file."""

    location: str
    offset: int
    size: int
    """Bytes."""


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    """Read many stretches at the same time; near ones of a file share a request.

    Returns:
        For each range its bytes, fewer where the file ends before, or what went wrong with it: a FileNotFoundError, a
        StorageError.
    """
    found: list[bytes | Exception] = [b""] * len(ranges)
    groups = _merged(ranges)
    locations = [group.range.location for group in groups]
    answers = call_each(
        locations, [_reading(group.range, [ranges[place] for place in group.members]) for group in groups]
    )
    for group, answer in zip(groups, answers, strict=True):
        for number, place in enumerate(group.members):
            found[place] = answer if isinstance(answer, Exception) else answer[number]
    return found


@dataclass(slots=True)
class _Group:
    range: ByteRange
    members: list[int]


def _merged(ranges: Sequence[ByteRange]) -> list[_Group]:
    groups: list[_Group] = []
    places = [place for place, wanted in enumerate(ranges) if wanted.size > 0]
    for place in sorted(places, key=lambda place: (ranges[place].location, ranges[place].offset)):
        wanted = ranges[place]
        last = groups[-1] if groups else None
        if last is not None and last.range.location == wanted.location:
            begin, end = last.range.offset, last.range.offset + last.range.size
            new_end = max(end, wanted.offset + wanted.size)
            if wanted.offset - end <= MERGE_GAP_BYTES and (new_end - begin <= _MAX_MERGED_BYTES or wanted.offset < end):
                last.range = ByteRange(wanted.location, begin, new_end - begin)
                last.members.append(place)
                continue
        groups.append(_Group(wanted, [place]))
    return groups


def _reading(all_of_them: ByteRange, wanted: Sequence[ByteRange]) -> Action[list[bytes]]:
    def read(store: Any, path: str) -> list[bytes]:
        try:
            content = memoryview(store.get_range(path, start=all_of_them.offset, length=all_of_them.size))
        except Exception as error:
            if status_of(error) != 416:
                raise
            content = memoryview(b"")  # the file ends before
        starts = [one.offset - all_of_them.offset for one in wanted]
        return [bytes(content[start : start + one.size]) for start, one in zip(starts, wanted, strict=True)]

    return read
