"""Logits in any Parquet: a column of ids, and a column of lists with a number for each class."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ForeignLogitsError, UsageError
from pipeline.logits.imports.foreign_logits import ForeignLogits, Held, OnRows, RowReader, damage_told, to_logits
from pipeline.storage import files as storage
from pipeline.storage.mapped_arrays import forget_pages, scratch_array

_ROWS_AT_ONCE = 1 << 12


class ParquetLogits(ForeignLogits):
    """Rows of an id and a list of numbers, in one file or several.

    Args:
        files: paths or URLs.
        id_column: strings.
        values_column: lists of floats, all of one length; of fixed size or not.
        held: what the numbers are.

    Raises:
        ForeignLogitsError: a file is damaged, or has no such columns.
    """

    layout: ClassVar[str] = "parquet"

    def __init__(self, files: tuple[str, ...], id_column: str, values_column: str, held: Held) -> None:
        self.held = held
        self.files = files
        self._id_column = id_column
        self._values_column = values_column
        self._group_sizes = [self._check(file) for file in files]  # of each file's row groups
        self.classes = self._width()

    def _check(self, location: str) -> list[int]:
        with self._open(location) as file:
            schema, metadata = file.schema_arrow, file.metadata
            for name, right, wanted in (
                (self._id_column, _is_text, "strings"),
                (self._values_column, _is_lists, "lists of floats"),
            ):
                if name not in schema.names:
                    raise UsageError(f"{location}: has no column {name}; it has {', '.join(schema.names)}")
                if not right(schema.field(name).type):
                    raise ForeignLogitsError(
                        f"{location}: column {name} is {schema.field(name).type}; expected {wanted}"
                    )
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _width(self) -> int:
        for location in self.files:
            with self._open(location) as file:
                for batch in file.iter_batches(1, columns=[self._values_column]):
                    if batch.num_rows:
                        return len(batch.column(0)[0].as_py() or ())
        raise ForeignLogitsError(f"{self.files[0]}: holds no rows")

    @contextmanager
    def _open(self, location: str) -> Iterator[pq.ParquetFile]:
        with (
            damage_told(location, "Parquet file", pa.ArrowException, OSError),
            storage.open_input(location) as stream,
            pq.ParquetFile(stream, pre_buffer=False) as file,
        ):
            yield file

    def names(self) -> pa.StringArray:
        """Returns each row's id."""
        found: list[pa.Array] = []
        for location in self.files:
            with self._open(location) as file:
                found += file.read(columns=[self._id_column])[self._id_column].cast(pa.string()).chunks
        return cast("pa.StringArray", pa.concat_arrays(found) if found else pa.array([], pa.string()))

    @contextmanager
    def open_rows(self, rows: np.ndarray, on_rows: OnRows) -> Iterator[RowReader]:
        """Copy what is wanted into a scratch file, as half-precision logits; Parquet can't be read row by row."""
        scratch = scratch_array((len(rows), self.classes), np.float16)
        place = 0
        for first, numbers in self._batches(rows):
            wanted = rows[place : np.searchsorted(rows, first + len(numbers))]
            with np.errstate(over="ignore"):  # what is too large for half precision is told as not finite
                scratch[place : place + len(wanted)] = numbers[wanted - first]
            place += len(wanted)
            on_rows(len(wanted))
            forget_pages(scratch)

        def read(asked: np.ndarray) -> np.ndarray:
            found = scratch[np.searchsorted(rows, asked)].astype(np.float32)
            forget_pages(scratch)
            return found

        yield read

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Read the row groups that hold any of `rows`: their logits, with the number of the first row."""
        first = 0
        for location, sizes in zip(self.files, self._group_sizes, strict=True):
            with self._open(location) as file:
                for group, size in enumerate(sizes):
                    row = first
                    first += size
                    if np.searchsorted(rows, row) == np.searchsorted(rows, row + size):
                        continue
                    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self._values_column]):
                        yield row, to_logits(self._matrix(batch.column(0), row, location), self.held, location)
                        row += batch.num_rows

    def _matrix(self, lists: pa.Array, first_row: int, location: str) -> np.ndarray:
        """(rows,) lists → (rows, classes); a null number is NaN."""
        lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero(lengths != self.classes)).size:
            row, length = int(wrong[0]), int(lengths[wrong[0]])
            raise ForeignLogitsError(
                f"{location}: {self._values_column} of row {first_row + row} of all files "
                f"{'is null' if length < 0 else f'has {length} numbers'}, but the first row has {self.classes}"
            )
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), self.classes)


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)


def _is_lists(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_floating(kind.value_type)
