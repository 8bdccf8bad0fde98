"""EfficientAT's logits: a `.npy` of (rows, classes), and a pickled dict that says which row is which clip."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.errors import ForeignLogitsError
from pipeline.logits.imports.foreign_logits import (
    ForeignLogits,
    Held,
    OnRows,
    RowReader,
    damage_told,
    local_file,
    to_logits,
)
from pipeline.logits.imports.name_index import read_name_index
from pipeline.storage.mapped_arrays import forget_pages


class EfficientAtLogits(ForeignLogits):
    """Such as `passt_enemble_logits_mAP_495.npy` with `fname_to_index.pkl`. The array is mapped, never loaded.

    Args:
        array: the `.npy`: any floating point type.
        index: the pickle: names, such as bare YouTube ids, to rows.
        held: what the numbers are.

    Raises:
        ForeignLogitsError: a file is damaged, or the two do not fit each other.
        UsageError: a file is not on this machine.
    """

    layout: ClassVar[str] = "efficientat-npy"

    def __init__(self, array: str, index: str, held: Held) -> None:
        self.held = held
        self.files = (array, index)
        path, index_path = local_file(array, "--npy"), local_file(index, "--index")
        with damage_told(array, ".npy file", ValueError, OSError, EOFError):
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(self._array, np.ndarray) or self._array.ndim != 2 or self._array.dtype.kind != "f":
            found = getattr(self._array, "dtype", "an archive"), getattr(self._array, "shape", "of arrays")
            raise ForeignLogitsError(f"{array}: holds {found[0]} {found[1]}; expected (rows, classes) of floats")
        self.classes = self._array.shape[1]
        self._index = read_name_index(index_path)
        self._check_rows(array, index)

    def _check_rows(self, array: str, index: str) -> None:
        rows, length = self._index.rows, len(self._array)
        if not len(rows):
            raise ForeignLogitsError(f"{index}: names no row")
        if rows.max() >= length:
            raise ForeignLogitsError(
                f"{index}: names row {rows.max()}, but {array} has {length} rows. The two are not of one release"
            )
        if len(np.unique(rows)) < len(rows):
            row = int(np.flatnonzero(np.bincount(rows) > 1)[0])
            first, second = self._index.names.take(pa.array(np.flatnonzero(rows == row)[:2])).to_pylist()
            raise ForeignLogitsError(f"{index}: {first} and {second} are both row {row}; an index has a row for each")

    def names(self) -> pa.StringArray:
        """Returns each row's name, null where the index has none."""
        of_row = np.full(len(self._array), -1, np.int64)  # (rows,), position in the index
        of_row[self._index.rows] = np.arange(len(self._index.rows))
        return self._index.names.take(pa.array(of_row, mask=of_row < 0))

    @contextmanager
    def open_rows(self, rows: np.ndarray, on_rows: OnRows) -> Iterator[RowReader]:
        """Read straight from the mapped file."""
        on_rows(len(rows))
        yield self._read

    def _read(self, rows: np.ndarray) -> np.ndarray:
        numbers = self._array[rows]  # (some, classes)
        forget_pages(self._array)
        return to_logits(numbers, self.held, self.files[0])
