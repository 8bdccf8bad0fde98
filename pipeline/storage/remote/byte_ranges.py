"""Byte ranges of remote files, many at a time; near ones of a file share a request."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from pipeline.errors import StorageError
from pipeline.storage.remote.calls import CONCURRENCY, pause, resolve
from pipeline.storage.remote.failures import code_of, explain, status_of, tries_for

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
    for group, content in zip(groups, _fetch([group.range for group in groups]), strict=True):
        for place in group.members:
            wanted = ranges[place]
            start = wanted.offset - group.range.offset
            found[place] = content if isinstance(content, Exception) else content[start : start + wanted.size]
    return found


@dataclass(slots=True)
class _Group:
    range: ByteRange
    members: list[int]


def _merged(ranges: Sequence[ByteRange]) -> list[_Group]:
    groups: list[_Group] = []
    for place in sorted(range(len(ranges)), key=lambda place: (ranges[place].location, ranges[place].offset)):
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


def _fetch(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    found: list[bytes | Exception] = [b""] * len(ranges)
    left = [place for place, wanted in enumerate(ranges) if wanted.size > 0]
    for attempt in itertools.count(1):
        answers = _send([ranges[place] for place in left])
        again: list[int] = []
        worst: Exception | None = None
        for place, answer in zip(left, answers, strict=True):
            if isinstance(answer, Exception) and attempt < tries_for(answer, ranges[place].location):
                again.append(place)
                worst = answer
            elif isinstance(answer, Exception):
                beyond_end = status_of(answer) == 416 or code_of(answer) == "InvalidRange"
                found[place] = b"" if beyond_end else explain(answer, ranges[place].location)
            else:
                found[place] = _checked(answer, ranges[place])
        left = again
        if worst is None:
            break
        pause(worst, attempt, ranges[left[0]].location)
    return found


def _send(ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
    """Send a request for each range, a bounded number at a time."""
    if not ranges:
        return []
    filesystem, _ = resolve(ranges[0].location)
    paths = [resolve(wanted.location)[1] for wanted in ranges]
    ends = [wanted.offset + wanted.size for wanted in ranges]
    if filesystem.async_impl:
        starts = [wanted.offset for wanted in ranges]
        return cast("Any", filesystem).cat_ranges(paths, starts, ends, on_error="return", batch_size=CONCURRENCY)

    def read(place: int) -> bytes | Exception:
        try:
            with filesystem.open(paths[place], "rb", cache_type="none") as stream:
                stream.seek(ranges[place].offset)
                return cast("bytes", stream.read(ranges[place].size))
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(CONCURRENCY, len(ranges))) as threads:
        return list(threads.map(read, range(len(ranges))))


def _checked(answer: bytes, wanted: ByteRange) -> bytes | Exception:
    if len(answer) <= wanted.size:
        return answer
    if wanted.offset == 0:
        return answer  # the whole file, which whoever asked for its beginning can use
    return StorageError(
        f"{wanted.location}: the server ignores byte ranges and sends the whole file. Use a server that knows them "
        "(nginx, Apache, Caddy, any object store), or copy the folder here"
    )
