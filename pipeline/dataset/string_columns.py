"""Work on millions of ids at once, in Arrow's own buffers: no Python object is made for each."""

from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def string_lengths(strings: pa.StringArray) -> np.ndarray:
    """Returns the length of each string in bytes: (rows,) int32."""
    return cast("pa.Int32Array", pc.call_function("binary_length", [strings])).to_numpy()


def string_parts(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each string begins in the UTF-8 bytes, (rows + 1,) int32, and these bytes, (bytes,) uint8."""
    if not len(strings):
        return np.zeros(1, np.int32), np.zeros(0, np.uint8)
    _, offsets, data = strings.buffers()
    return np.frombuffer(offsets, np.int32)[strings.offset :][: len(strings) + 1], np.frombuffer(data or b"", np.uint8)


def string_bytes(strings: pa.StringArray) -> bytes:
    """Returns strings as bytes, so that no two lists of strings give the same: all lengths, then all bytes."""
    starts, data = string_parts(strings)
    return np.diff(starts).astype("<i8").tobytes() + data[starts[0] : starts[-1]].tobytes()


def repeated_rows(strings: pa.StringArray) -> np.ndarray:
    """Returns the rows, ascending, whose string an earlier row has: int64."""
    if not len(strings):
        return np.zeros(0, np.int64)
    # Arrow numbers the strings as they first occur, so that a number which is no new maximum was there before.
    numbers = strings.dictionary_encode().indices.to_numpy()
    return np.flatnonzero(numbers[1:] <= np.maximum.accumulate(numbers)[:-1]) + 1


def first_rows(wanted: pa.StringArray, strings: pa.StringArray) -> np.ndarray:
    """Returns the first row of `strings` that each wanted string is at: (wanted,) int32; all have to occur."""
    rows = pc.call_function("index_in", [wanted], pc.SetLookupOptions(strings))
    return cast("pa.Int32Array", rows).to_numpy()
