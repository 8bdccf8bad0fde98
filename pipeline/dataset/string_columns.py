"""Work on millions of ids at once, in Arrow's own buffers: no Python object is made for each."""

from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ROWS_AT_ONCE = 1 << 16


def string_lengths(strings: pa.StringArray) -> np.ndarray:
    """Returns the length of each string in bytes: (rows,) int32."""
    return np.diff(_offsets(strings))


def string_bytes(strings: pa.StringArray) -> bytes:
    """Returns strings as bytes, so that no two lists of strings give the same: all lengths, then all bytes."""
    offsets = _offsets(strings)
    return np.diff(offsets).astype("<i8").tobytes() + _data(strings)[offsets[0] : offsets[-1]].tobytes()


def string_hashes(strings: pa.StringArray) -> np.ndarray:
    """Returns a 64-bit hash of each string: (rows,) uint64, the same on every machine."""
    offsets, data = _offsets(strings), _data(strings)
    weights = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, 4096, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(strings), dtype=np.uint64)
    for first in range(0, len(strings), _ROWS_AT_ONCE):
        part = offsets[first : first + _ROWS_AT_ONCE + 1].astype(np.int64)
        starts, lengths = part[:-1] - part[0], np.diff(part)
        position = np.arange(part[-1] - part[0]) - np.repeat(starts, lengths)  # (bytes,), of each byte in its string
        terms = (data[part[0] : part[-1]].astype(np.uint64) + np.uint64(1)) * weights[position % len(weights)]
        # A running total, so that an empty string is a difference of zero.
        totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        hashes[first : first + _ROWS_AT_ONCE] = totals[part[1:] - part[0]] - totals[starts]
    return hashes


def repeated_rows(strings: pa.StringArray) -> np.ndarray:
    """Returns the rows, ascending, whose string an earlier row has: int64."""
    hashes = string_hashes(strings)
    in_order = np.sort(hashes)
    shared = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    seen: set[str] = set()
    repeats: list[int] = []
    for row in np.flatnonzero(np.isin(hashes, shared)) if len(shared) else ():
        text = strings[int(row)].as_py()
        if text in seen:
            repeats.append(int(row))
        seen.add(text)
    return np.array(repeats, dtype=np.int64)


def first_rows(wanted: pa.StringArray, strings: pa.StringArray) -> np.ndarray:
    """Returns the first row of `strings` that each wanted string is at: (wanted,) int32; all have to occur."""
    rows = pc.call_function("index_in", [wanted], pc.SetLookupOptions(strings))
    return cast("pa.Int32Array", rows).to_numpy()


def _offsets(strings: pa.StringArray) -> np.ndarray:
    """(rows + 1,) int32, where each string begins in the data."""
    if not len(strings):
        return np.zeros(1, np.int32)
    return np.frombuffer(strings.buffers()[1], dtype=np.int32)[strings.offset :][: len(strings) + 1]


def _data(strings: pa.StringArray) -> np.ndarray:
    return np.frombuffer(strings.buffers()[2] or b"", dtype=np.uint8)
